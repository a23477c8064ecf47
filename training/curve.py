"""The learning curve of a run, drawn from its logs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tokexport.training.loop import LOG_FILE

_SHARES = ("category", "colour", "size", "centre", "texture", "right")


def read_logs(folder: Path, stages: Sequence[str]) -> list[list[Mapping[str, Any]]]:
    """Return the lines of each stage's log; of a step that was trained twice, after an interruption, the last."""
    logs: list[list[Mapping[str, Any]]] = []
    for stage in stages:
        path = folder / stage / LOG_FILE
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
        logs.append(list({line["step"]: line for line in lines}.values()))
    return logs


def draw_curve(folder: Path, stages: Sequence[str]) -> Path:
    """Draw loss and shares of right predictions over the minutes of each stage, as SVG."""
    logs = read_logs(folder, stages)
    figure = Figure(figsize=(4.2 * len(stages), 5.5), layout="constrained")
    panels: Any = figure.subplots(2, len(stages), squeeze=False)
    for column, (stage, lines) in enumerate(zip(stages, logs, strict=True)):
        minutes = [line["seconds"] / 60 for line in lines]
        loss, shares = panels[0][column], panels[1][column]
        loss.plot(minutes, [line["loss"] for line in lines], color="black", linewidth=1)
        loss.set(title=stage, ylabel="loss" if column == 0 else "", yscale="log")
        for key in _SHARES:
            if lines and key in lines[0]:
                shares.plot(minutes, [100 * line[key] for line in lines], label=key, linewidth=1)
        shares.set(xlabel="minutes", ylabel="right, %" if column == 0 else "", ylim=(0, 101))
        if shares.lines:
            shares.legend(fontsize="small")
    path = folder / "curve.svg"
    figure.savefig(path, metadata={"Date": None})
    return path
