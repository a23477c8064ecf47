"""The first token of one artefact beside another's."""

import re
from pathlib import Path

from click.testing import CliRunner

from benchmarks.first_token import main
from tokexport.exporter.bundle import Bundle


def test_an_artefact_stands_beside_another(tiny_adsc: Bundle, tiny_full: Bundle):
    paths = [str(tiny_adsc.path), str(tiny_full.path)]
    result = CliRunner().invoke(main, [*paths, "--processes", "2", "--repeats", "3", "--text-tokens", "8"])
    assert result.exit_code == 0, result.output
    _, _, *rows, empty, verdict = result.stdout.splitlines()
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == paths
    assert all(len(cell.split(", ")) == 2 for row in rows for cell in row.strip("| ").split(" | ")[1:])
    assert empty == ""
    ratio, low, high = map(float, re.findall(r"\d+\.\d{3}", verdict))
    assert 0 < low <= ratio <= high


def test_what_is_no_artefact_is_refused_in_one_line(tmp_path: Path):
    result = CliRunner().invoke(main, [str(tmp_path / "a"), str(tmp_path / "b")])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
