"""What it gains, and costs, to choose vision tokens anew for every question.

A method that chooses by attention does so once, when the image comes, by the question that comes with it. To let a
later question choose, image and conversation have to be read again. Both ways are asked the same dialogues, and
compared question by question.

Q questions, T turns
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tokexport.engines.backend import load_backend
from tokexport.engines.intervals import Floats, paired_difference
from tokexport.errors import InputError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.method import arriving_plans, load_methods

if TYPE_CHECKING:
    from tokexport.engines.evaluate import Evaluation
    from tokexport.engines.model import Answer, ReadingCost

RESELECTION = "one cache -> tokens chosen anew, and all read again, with every question"
"""What the rows of ``reselection_rows`` are about."""

RESELECTION_COLUMNS = ("accuracy", "difference, points", "questions", "tokens read", "first token, ms")


def require_choice(bundle: Bundle, backend: str) -> None:
    """Check that an artefact chooses vision tokens by the question, with an engine.

    Raises:
        InputError: it does not, so choosing anew changes nothing.
    """
    if not _chooses_by_question(bundle):
        raise InputError(
            f"{bundle.path} keeps the same vision tokens whatever is asked, so --reselect has no effect; it is for "
            "methods that choose by the question, like fastv"
        )
    if not load_backend(backend).is_compressed:
        raise InputError(
            f"backend {backend!r} runs all vision tokens, so none are chosen and --reselect has no effect; leave it "
            "out, or choose a backend that runs the artefact, like ort"
        )


def _chooses_by_question(bundle: Bundle) -> bool:
    import torch  # what continues on its cache does without

    # Not by the outputs of the graph: those of earlier versions choose and do not tell.
    methods = load_methods(bundle.recipe.compress)
    with torch.device("meta"):
        return any(
            bottleneck.look is not None and bottleneck.look.reads_text
            for method, arriving in zip(methods, arriving_plans(methods, bundle.spec), strict=False)
            for bottleneck in method.bottlenecks(bundle.spec, arriving).values()
        )


def reselection_report(continuing: "Evaluation", reselected: "Evaluation") -> dict[str, Any]:
    """Return how choosing anew stands beside continuing on the cache, over all questions and by turn.

    Args:
        continuing: how dialogues were answered on one cache.
        reselected: how the same were answered where everything was read again with every question.
    """
    assert continuing.sha256 == reselected.sha256, "not the same questions"
    turns = [int(turn) for turn in np.unique(continuing.turn_Q)]
    member_QT = np.stack([continuing.turn_Q > 0, *(continuing.turn_Q == turn for turn in turns)], axis=1)
    changes = [
        paired_difference(
            reselected.scores_Q[is_asked_Q], continuing.scores_Q[is_asked_Q], continuing.dialogue_Q[is_asked_Q]
        )
        for is_asked_Q in member_QT.T
    ]
    entries = [
        {
            "questions": int(is_asked_Q.sum()),
            **_both("accuracy", continuing.scores_Q, reselected.scores_Q, is_asked_Q),
            "difference": change.mean,
            "difference_interval": list(change.interval),
            "gained": change.gained,
            "lost": change.lost,
            **_both("read_tokens", continuing.read_tokens_Q, reselected.read_tokens_Q, is_asked_Q),
            **_both("ttft_ms", continuing.ttft_ms_Q, reselected.ttft_ms_Q, is_asked_Q),
        }
        for is_asked_Q, change in zip(member_QT.T, changes, strict=True)
    ]
    by_turn = [{"turn": turn, **entry} for turn, entry in zip(turns, entries[1:], strict=True)]
    return {**entries[0], "per_turn": by_turn}


def reselection_rows(report: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    """Yield which questions, and of them what ``RESELECTION_COLUMNS`` names, on the cache -> chosen anew."""
    for name, entry in [("all questions", report), *((f"turn {entry['turn']}", entry) for entry in report["per_turn"])]:
        accuracy, tokens, ttft = (entry[key] for key in ("accuracy", "read_tokens", "ttft_ms"))
        low, high = entry["difference_interval"]
        yield (
            name,
            f"{100 * accuracy['continuing']:.1f} -> {100 * accuracy['reselected']:.1f} %",
            f"{100 * entry['difference']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})",
            f"{entry['gained']:,} gained, {entry['lost']:,} lost",
            f"{tokens['continuing']:.0f} -> {tokens['reselected']:.0f}",
            f"{ttft['continuing']:.1f} -> {ttft['reselected']:.1f}",
        )


def reselection_text(answer: "Answer", continuing: "ReadingCost | None") -> str:
    """Return what an answer cost for which tokens were chosen anew, beside what continuing would have."""
    read = (
        f"chosen anew for this question: {answer.prompt_tokens} text and {answer.vision_tokens} vision tokens read, "
        f"first token after {answer.ttft_ms:.0f} ms"
    )
    if continuing is None:
        return read
    return f"{read}; continuing on the cache reads {continuing.text_tokens} text tokens in {continuing.ms:.0f} ms"


def _both(name: str, continuing_Q: Floats, reselected_Q: Floats, is_asked_Q: Any) -> dict[str, dict[str, float]]:
    return {
        name: {
            "continuing": float(continuing_Q[is_asked_Q].mean()),
            "reselected": float(reselected_Q[is_asked_Q].mean()),
        }
    }
