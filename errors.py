"""Everything that can go wrong for a user, as one tree.

```
TokexportError              exit 1   what came, what was expected, what to do
├── RecipeError                      a recipe, or a value set on the command line
├── CheckpointError                  a model directory or its weights
├── BundleError                      an artefact: damaged, foreign, newer, or in the way
├── InputError                       an image, a prompt, a number given to a run
├── BackendUnavailableError          an engine that is not installed or cannot do this
├── ExportError                      a graph that could not be made as promised
├── EngineError                      a compiled engine: not built as promised, or for something else than this
├── TrainingError                    training that cannot start, go on, or be stored
├── ParityError             exit 3   two implementations disagree
└── GateError               exit 4   a measured figure is under the bar
```
"""

from collections.abc import Iterable
from difflib import get_close_matches


class TokexportError(Exception):
    """An error the user can act on; its text is one line."""

    exit_code = 1


class RecipeError(TokexportError):
    """A recipe that cannot be read or does not fit the model."""


class CheckpointError(TokexportError):
    """A checkpoint that is missing, damaged or of another kind."""


class BundleError(TokexportError):
    """An artefact that cannot be read, trusted or written."""


class InputError(TokexportError):
    """An image, a prompt or a number that a run cannot take."""


class BackendUnavailableError(TokexportError):
    """An engine that is not installed, or that cannot do what was asked."""


class ExportError(TokexportError):
    """A graph that breaks what tokexport promises of it."""


class EngineError(TokexportError):
    """An engine that could not be built as promised, or that was built for something else."""


class TrainingError(TokexportError):
    """Training that cannot start, go on, or be stored."""


class ParityError(TokexportError):
    """Two implementations of the same model disagree."""

    exit_code = 3


class GateError(TokexportError):
    """A measured figure misses the bar that the user set."""

    exit_code = 4


def nearest(name: str, choices: list[str]) -> str:
    """Return ``; did you mean 'x'?`` or the list of choices, to end an error's text with."""
    close = get_close_matches(name, choices, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; choose one of: {', '.join(sorted(choices))}" if choices else ""


def nearest_numbers(number: int, choices: Iterable[int]) -> str:
    """Return ``below or above``, the choices next to a number that is none of them."""
    ascending = sorted(choices)
    below, above = [n for n in ascending if n < number], [n for n in ascending if n > number]
    return " or ".join(map(str, below[-1:] + above[:1]))
