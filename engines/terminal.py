"""Speaking to people while something runs: on stderr, as stdout is for answers and JSON."""

import contextlib
from collections.abc import Generator

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

# Wide enough for every table, where nobody sees a line break.
_WIDTH_OF_FILES = 160


class Terminal:
    """Progress and results for people.

    Args:
        quiet: say nothing.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet, markup=False)
        if not self._console.is_terminal:
            self._console.width = _WIDTH_OF_FILES
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[amount]}"),
        )
        self._progress = Progress(*columns, console=self._console, transient=True, disable=quiet)
        self._task = self._progress.add_task("starting", total=None, amount="")

    @contextlib.contextmanager
    def working(self) -> Generator[None]:
        """Show what is being done: a line that changes on a terminal, one line a step elsewhere."""
        with self._progress if self._console.is_terminal else contextlib.nullcontext():
            yield

    def step(self, text: str) -> None:
        """Say what is done now."""
        if self._console.is_terminal:
            # Each step has a rate of its own.
            self._progress.reset(self._task, description=text, total=None, amount="")
        else:
            self._console.print(text, highlight=False)

    def tick(self, done: int, total: int) -> None:
        """Say how much of it is done."""
        self._progress.update(self._task, completed=done, total=total)

    def written(self, done: int, total: int) -> None:
        """Say how many bytes of it are written, and how fast."""
        self._progress.update(self._task, completed=done, total=total)
        speed = self._progress.tasks[0].speed
        rate = f", {speed / 1e6:,.0f} MB/s" if speed else ""
        self._progress.update(self._task, amount=f"{done / 1e9:.1f} of {total / 1e9:.1f} GB{rate}")

    def show(self, *items: RenderableType) -> None:
        """Print results."""
        for item in items:
            self._console.print(item, highlight=False, soft_wrap=isinstance(item, str))
