"""Judging whether two tensors are the same up to rounding."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tokexport.recipes.tables import parse_table

Kind = Literal["image_features", "logits", "cache", "scores"]


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """A bound on the largest difference, absolute or as a part of the largest value expected; or one on the norm.

    Attributes:
        norm: bound on the Euclidean norm of the difference as a part of that of what is expected, in place of the
            others. It is for what rounding leaves of a tensor as a whole, whose single values say little.
    """

    absolute: float = 0.0
    relative: float = 0.0
    norm: float | None = None
    reason: str

    def bound(self, expected: NDArray[np.generic]) -> float:
        """Return the largest difference allowed."""
        return self.absolute + self.relative * float(np.abs(expected).max(initial=0))


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison.

    ``max_abs_diff`` of tokens or indices is the number that differ; ``cosine`` is then 1 or 0. ``norm_diff`` is what is
    held against the tolerance where that is one on the norm.
    """

    step: str
    name: str
    passed: bool
    max_abs_diff: float
    mean_abs_diff: float = 0.0
    cosine: float
    norm_ratio: float = 1.0
    tolerance: float
    norm_diff: float | None = None
    graph: str = ""
    layer: int | None = None
    note: str = ""


def difference_of(check: Mapping[str, Any]) -> float | None:
    """Return what a stored check held against its tolerance, None where nothing could be compared."""
    norm_diff = check.get("norm_diff")
    return check["max_abs_diff"] if norm_diff is None else norm_diff


def load_tolerances(table_name: str) -> Mapping[Kind, Tolerance]:
    """Return the tolerances of graphs in a precision, or of one of the steps of quantization."""
    text = (resources.files("tokexport.engines") / "tolerances.toml").read_text()
    table = tomllib.loads(text)[table_name]
    return {kind: parse_table(Tolerance, entry, f"[{table_name}.{kind}]") for kind, entry in table.items()}


def compare_tensors(
    name: str,
    found: NDArray[np.generic],
    expected: NDArray[np.generic],
    tolerance: Tolerance,
    *,
    step: str = "",
    graph: str = "",
    layer: int | None = None,
) -> Check:
    """Compare two tensors; another shape or a value that is not finite never passes."""
    note = _other_shape(found, expected) or _not_finite(found, expected)
    if note:
        return _incomparable(name, note, step=step, graph=graph, layer=layer, norm_ratio=0.0)
    bound = tolerance.bound(expected)
    a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    difference = np.abs(a - b)
    norm_a, norm_b = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    largest = float(difference.max(initial=0))
    share = float(np.linalg.norm(a - b)) / (norm_b or 1.0)
    passed = largest <= bound if tolerance.norm is None else share <= tolerance.norm
    return Check(
        step=step,
        name=name,
        passed=passed,
        max_abs_diff=largest,
        mean_abs_diff=float(difference.mean()) if difference.size else 0.0,
        cosine=float(a @ b / (norm_a * norm_b)) if norm_a and norm_b else float(norm_a == norm_b),
        norm_ratio=norm_a / norm_b if norm_b else 1.0,
        tolerance=bound if tolerance.norm is None else tolerance.norm,
        graph=graph,
        layer=layer,
        norm_diff=None if tolerance.norm is None else share,
    )


def compare_choices(
    name: str,
    found_QW: NDArray[np.float32],
    expected_QW: NDArray[np.float32],
    tolerance: Tolerance,
    *,
    step: str = "",
    graph: str = "",
) -> Check:
    """Compare the tokens that greedy decoding takes.

    Where they differ although the expected logits of both are closer than twice the tolerance, it is
    a near-tie, which rounding decides: it is reported and passes.
    """
    note = _other_shape(found_QW, expected_QW)
    if note:
        return _incomparable(name, note, step=step, graph=graph)
    rows = np.arange(len(found_QW))
    found, expected = found_QW.argmax(-1), expected_QW.argmax(-1)
    margin = expected_QW[rows, expected] - expected_QW[rows, found]
    differs = found != expected
    ties = int((differs & (margin <= 2 * tolerance.bound(expected_QW))).sum())
    wrong = int(differs.sum()) - ties
    return _counted(name, wrong, f"{ties} near-ties" if ties else "", step=step, graph=graph)


def compare_counts(name: str, wrong: Mapping[str, int], *, step: str = "", graph: str = "") -> Check:
    """Judge how many numbers of each of several parts are not what they must be."""
    total = sum(wrong.values())
    first = next((part for part, count in wrong.items() if count), "")
    note = f"{total} numbers differ, the first in {first}" if total else ""
    return _counted(name, total, note, step=step, graph=graph)


def compare_indices(
    name: str,
    found: NDArray[np.generic],
    expected: NDArray[np.generic],
    *,
    step: str = "",
    graph: str = "",
    layer: int | None = None,
) -> Check:
    """Compare kept-token indices, which must be equal."""
    note = f"{found.size} kept, expected {expected.size}"
    if _other_shape(found, expected):
        return _incomparable(name, note, step=step, graph=graph, layer=layer)
    wrong = int((found != expected).sum())
    return _counted(name, wrong, note if wrong else "", step=step, graph=graph, layer=layer)


def compare_kept(
    name: str,
    found_BM: NDArray[np.int64],
    score_BN: NDArray[np.float32],
    tolerance: Tolerance,
    *,
    step: str = "",
    graph: str = "",
    layer: int | None = None,
) -> Check:
    """Compare the tokens that were kept with those that have the highest scores, the first of equals.

    A token that is kept against its score is a near-tie, which rounding decides, where the scores of it and of the one
    that was left out for it are closer than twice the tolerance: it is reported and passes.
    """
    if found_BM.shape[0] != score_BN.shape[0] or found_BM.shape[1] > score_BN.shape[1]:
        note = f"{found_BM.shape[1]} kept of {score_BN.shape[1]}"
        return _incomparable(name, note, step=step, graph=graph, layer=layer)
    ties, wrong = misplaced_tokens(found_BM, score_BN, tolerance)
    note = f"{ties} near-ties among {found_BM.size} tokens" if ties else ""
    if wrong:
        note = f"{wrong} of {found_BM.size} tokens are kept against their scores, or not in order"
    return _counted(name, wrong, note, step=step, graph=graph, layer=layer)


def misplaced_tokens(
    found_BM: NDArray[np.int64], score_BN: NDArray[np.float32], tolerance: Tolerance
) -> tuple[int, int]:
    """Return how many kept tokens are not among those with the M highest scores: near-ties, and others.

    Tokens that are not in ascending order are all of the others.
    """
    ties = wrong = 0
    for found_M, score_N in zip(found_BM, score_BN, strict=True):
        if (np.diff(found_M) <= 0).any():
            wrong += len(found_M)
            continue
        order = np.argsort(-score_N, kind="stable")
        right_M = order[: len(found_M)]
        room = 2 * tolerance.bound(score_N)
        # As many are missing as were added; the highest that is missing was passed over for the lowest that was added.
        added = np.sort(score_N[np.setdiff1d(found_M, right_M)])
        missing = np.sort(score_N[np.setdiff1d(right_M, found_M)])[::-1]
        near = int((missing - added <= room).sum())
        ties, wrong = ties + near, wrong + len(added) - near
    return ties, wrong


def _counted(name: str, wrong: int, note: str, *, step: str, graph: str, layer: int | None = None) -> Check:
    """Return the check of things of which none may be wrong."""
    return Check(
        step=step,
        name=name,
        passed=wrong == 0,
        max_abs_diff=float(wrong),
        cosine=float(wrong == 0),
        tolerance=0.0,
        graph=graph,
        layer=layer,
        note=note,
    )


def _other_shape(found: NDArray[np.generic], expected: NDArray[np.generic]) -> str:
    return "" if found.shape == expected.shape else f"shape {found.shape}, expected {expected.shape}"


def _not_finite(found: NDArray[np.generic], expected: NDArray[np.generic]) -> str:
    if not np.isfinite(found).all():
        return "not every value is finite"
    return "" if np.isfinite(expected).all() else "not every value expected is finite"


def _incomparable(
    name: str, note: str, *, step: str, graph: str, layer: int | None = None, norm_ratio: float = 1.0
) -> Check:
    """Return the failed check of two arrays between which there is no difference to measure."""
    return Check(
        step=step,
        name=name,
        passed=False,
        max_abs_diff=float("inf"),
        cosine=0.0,
        norm_ratio=norm_ratio,
        tolerance=0.0,
        graph=graph,
        layer=layer,
        note=note,
    )
