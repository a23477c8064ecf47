"""The learning curve is drawn from the logs as they are, interruptions and all."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokexport.training.curve import draw_curve, read_logs


def write_log(folder: Path, stage: str, lines: Sequence[tuple[int, float]]) -> None:
    """Write steps and losses, ten seconds a step."""
    (folder / stage).mkdir()
    table = [{"stage": stage, "step": step, "seconds": 10.0 * step, "loss": loss, "right": 0.5} for step, loss in lines]
    (folder / stage / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in table))


def test_of_a_step_that_was_made_twice_the_last_counts(tmp_path: Path):
    write_log(tmp_path, "see", [(20, 3.0), (40, 2.0), (20, 2.9), (60, 1.0)])
    (lines,) = read_logs(tmp_path, ["see"])
    assert {line["step"]: line["loss"] for line in lines} == {20: 2.9, 40: 2.0, 60: 1.0}


def test_a_stage_that_has_not_begun_has_no_lines(tmp_path: Path):
    write_log(tmp_path, "see", [(20, 3.0)])
    assert [len(lines) for lines in read_logs(tmp_path, ["see", "talk"])] == [1, 0]


def test_every_stage_has_its_panels(tmp_path: Path):
    write_log(tmp_path, "see", [(20, 3.0), (40, 2.0)])
    drawn = draw_curve(tmp_path, ["see", "talk"]).read_text()
    assert drawn.startswith("<?xml")
    for text in ("see", "talk", "right, %", "loss"):
        assert f"<!-- {text} -->" in drawn
