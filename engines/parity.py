"""The parity ladder: from ``transformers`` to the engine, each rung with its own numbers.

```
transformers  --uncompressed-->  our modules in PyTorch
our modules, compressed  ----->  the same with what the recipe quantizes rounded
our modules, rounded  -------->  the portable ONNX graphs in ONNX Runtime
the portable graphs  --------->  the engine
```
On every rung both sides hold the same conversation of three turns on one cache, an image in the
first and the second. The right side is fed the tokens that the left side chose; where it would have
chosen the same at every step, its greedy answers are the same. Where something is quantized, tokens are not compared:
what that costs in answers is measured, not proved.

Where vision tokens are chosen by what is seen, rounding decides between nearly equal scores. If the right side chose
otherwise, the reference is asked again and made to keep the same, and its scores say whether each was a near-tie. What
the vision encoder chooses is no output of its graph and is read from the portable one; of an engine it is not known.
"""

import contextlib
import functools
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from tokexport.engines.backend import Choice, Session, SessionOptions, load_backend
from tokexport.engines.backends.transformers import TransformersSession
from tokexport.engines.compare import (
    Check,
    Tolerance,
    compare_choices,
    compare_counts,
    compare_indices,
    compare_kept,
    compare_tensors,
    load_tolerances,
)
from tokexport.engines.generate import IMAGE
from tokexport.engines.graph_parts import Reduction
from tokexport.engines.probe import NEW_TOKENS, TURNS, Probe, Transcript, make_probe, record
from tokexport.engines.source import source_design
from tokexport.engines.taps import VisionTaps
from tokexport.engines.torch_session import Follower, TorchSession
from tokexport.errors import BackendUnavailableError
from tokexport.exporter.bundle import Bundle, library_versions
from tokexport.exporter.export import Design, weight_names
from tokexport.exporter.graph_io import GRAPHS, GraphName
from tokexport.exporter.plan import TokenPlan
from tokexport.exporter.quantization import quantized_layers

_VISION: GraphName = "vision_encoder"
_DECODER: GraphName = "decoder_model_merged"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Verification:
    """The outcome of the whole ladder.

    Attributes:
        repro: the folder that a failure left, None where there is none.
        reduced: the smallest part of a graph that fails, None where none was looked for or found.
    """

    checks: tuple[Check, ...]
    dtype: str
    backend: str
    seconds: float
    repro: Path | None = None
    reduced: Reduction | None = None

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def first_failure(self) -> Check | None:
        return next((check for check in self.checks if not check.passed), None)

    @property
    def engine_failed(self) -> bool:
        """Whether the engine computes something else than the portable graphs."""
        return any(not check.passed for check in self.checks if check.step == _last_step(self.backend))

    def report(self) -> dict[str, Any]:
        """Return what ``tokexport verify --json`` prints; its keys are a contract."""
        return {
            "passed": self.passed,
            "backend": self.backend,
            "dtype": self.dtype,
            "seconds": round(self.seconds, 2),
            "checks": [_finite(asdict(check)) for check in self.checks],
            **({} if self.reduced is None else {"reduced": self.reduced.report()}),
        }


def verify(
    bundle: Bundle,
    backend: str,
    options: SessionOptions,
    *,
    repro: Path | None = None,
    progress: Progress = lambda _: None,
) -> Verification:
    """Climb the ladder up to ``backend``.

    Args:
        bundle: the artefact.
        backend: the engine to prove.
        options: threads and where the checkpoint lies; room is made as needed.
        repro: where a failure leaves what is needed to look into it, None for nowhere.
        progress: told what is being run.

    Raises:
        CheckpointError: the checkpoint that the artefact was made from is not at hand.
    """
    started = time.perf_counter()
    if repro is not None:
        shutil.rmtree(repro, ignore_errors=True)  # of an older failure
    require_provable(backend, bundle.recipe.export.dtype)
    made = source_design(bundle, options.source)
    probe = make_probe(made)
    num_text = sum(before + after for before, _, after in TURNS) + len(TURNS) * NEW_TOKENS
    options = replace(options, max_text_tokens=num_text, max_images=sum(has_image for _, has_image, _ in TURNS))
    ladder = _Ladder(probe, made.recipe.export.dtype, bundle, repro)

    _climb_uncompressed(ladder, made, options, probe, progress)

    progress("our modules, compressed")
    quantize, ours, step = made.recipe.quantize, TorchSession(made, options), "reference vs ort-portable"
    expected, outputs = record(ours, probe), ours.vision_layer_outputs(probe.pixel_values)
    del ours
    if quantize.is_active:
        progress("our modules, quantized")
        expected, outputs = _climb_rounded(ladder, made, options, probe, expected, outputs)
        step = "quantized reference vs ort-portable"

    progress("ort-portable")
    matrices = {quantize.vision_encoder, quantize.decoder} - {"none"}
    judged_by = "bytes" if "int8" in matrices else None
    found = VisionTaps(bundle, list(outputs), threads=options.threads)(probe.pixel_values)
    following = Follower.of(found, made, options, is_quantized=quantize.is_active)
    chosen: Mapping[str, Choice] = {}
    if following.kept:
        judge = following.open()
        chosen = judge.stage_choices(probe.pixel_values, following.kept)
        if not following.keeps_as(outputs):
            expected, outputs = record(judge, probe, expected.answers), judge.vision_layer_outputs(probe.pixel_values)
        del judge
    graph_checks = [
        *_index_checks(step, bundle, made),
        *_rounding_checks(step, bundle, made),
        *ladder.vision_checks(step, found, following.without_kept(outputs), judged_by),
        *ladder.stage_checks(step, following.kept, chosen, "bytes" if quantize.vision_encoder == "int8" else None),
    ]
    portable = load_backend("ort-portable").open(bundle, options)
    expected = ladder.climb(step, portable, expected, graph_checks, judged_by=judged_by, following=following.open)
    engine = load_backend(backend)
    if backend != "ort-portable":
        progress(backend)
        judged_by = "bytes" if matrices else None
        session = engine.open(bundle, options)
        ladder.climb(_last_step(backend), session, expected, judged_by=judged_by, following=following.open)
    seconds = time.perf_counter() - started
    return Verification(tuple(ladder.checks), made.recipe.export.dtype, backend, seconds, ladder.written)


def _climb_uncompressed(
    ladder: "_Ladder", made: Design, options: SessionOptions, probe: Probe, progress: Progress
) -> None:
    """Climb from ``transformers`` to our modules, all vision tokens kept."""
    full = replace(made, methods=(), plans=(TokenPlan.uncompressed(made.model.spec),))
    progress("transformers, uncompressed")
    truth = TransformersSession(full, options)
    expected = record(truth, probe)
    ladder.add([_whole_model_check(truth, probe, expected, made.recipe.export.dtype)], expected, expected)
    del truth
    progress("our modules, uncompressed")
    ladder.climb("transformers vs reference", TorchSession(full, options), expected)


def _climb_rounded(
    ladder: "_Ladder",
    made: Design,
    options: SessionOptions,
    probe: Probe,
    expected: Transcript,
    outputs: Mapping[str, NDArray[np.float32]],
) -> tuple[Transcript, Mapping[str, NDArray[np.float32]]]:
    """Climb to our modules with what the recipe quantizes rounded; return what they answer and compute of images."""
    quantize, quantized = made.recipe.quantize, TorchSession(made, options, is_quantized=True)
    rounded = quantized.vision_layer_outputs(probe.pixel_values)
    following = Follower.of(rounded, made, options)
    if not following.keeps_as(outputs):
        expected = record(following.open(), probe, expected.answers)
    lost = "int4" if "int4" in (quantize.vision_encoder, quantize.decoder) else "int8"
    step = "reference vs quantized reference"
    return ladder.climb(step, quantized, expected, judged_by=lost, following=following.open), rounded


def _last_step(backend: str) -> str:
    return f"ort-portable vs {backend}"


def require_provable(backend: str, dtype: str) -> None:
    """Check that the ladder can be climbed to an engine.

    Raises:
        BackendUnavailableError: it or the portable rung below it is missing, does not run ``dtype``, or runs no
            graphs, so that nothing of an artefact would be proved.
    """
    engine = load_backend(backend)
    if not engine.runs_graphs:
        raise BackendUnavailableError(
            f"backend {backend!r} runs the checkpoint, not the graphs, so it proves nothing about them; choose "
            "another, e.g. ort"
        )
    for rung in (load_backend("ort-portable"), engine):
        rung.require(dtype)


class _Ladder:
    """Collects checks, and keeps what the first failed rung computed."""

    def __init__(self, probe: Probe, dtype: str, bundle: Bundle, repro: Path | None) -> None:
        self.checks: list[Check] = []
        self.written: Path | None = None
        self._probe, self._bundle, self._repro = probe, bundle, repro
        self._dtype = dtype

    def climb(
        self,
        step: str,
        session: Session,
        expected: Transcript,
        before: Sequence[Check] = (),
        *,
        judged_by: str | None = None,
        following: Callable[[], TorchSession] | None = None,
    ) -> Transcript:
        """Compare a session with what is expected, and return what it answered to the same tokens.

        ``before`` are checks of the same rung that were made already, ``judged_by`` are the tolerances, by default
        those of the precision. ``following`` opens the reference that can be made to keep the same tokens.
        """
        tolerances = load_tolerances(judged_by or self._dtype)
        found = record(session, self._probe, expected.answers)
        if following is not None and not found.keeps_as(expected):
            reference = following()
            reference.follow(found.kept())
            expected = record(reference, self._probe, expected.answers)
        checks = [*before, *_choice_checks(step, found, expected, tolerances["scores"])]
        checks.append(
            compare_tensors(
                "image features",
                found.features,
                expected.features,
                tolerances["image_features"],
                step=step,
                graph=_VISION,
            )
        )
        # Layers before logits, so that the first check that fails tells the layer.
        for layer, (pair_a, pair_b) in enumerate(zip(found.cache, expected.cache, strict=True)):
            for name, a, b in zip(("keys", "values"), pair_a, pair_b, strict=True):
                checks.append(
                    compare_tensors(
                        f"{name}, layer {layer}",
                        a,
                        b,
                        tolerances["cache"],
                        step=step,
                        graph=_DECODER,
                        layer=layer,
                    )
                )
        for turn, (a, b) in enumerate(zip(found.logits, expected.logits, strict=True), start=1):
            tolerance = tolerances["logits"]
            checks.append(compare_tensors(f"logits, turn {turn}", a, b, tolerance, step=step, graph=_DECODER))
            if tolerance.norm is None:
                a, b = a[-NEW_TOKENS - 1 : -1], b[-NEW_TOKENS - 1 : -1]
                checks.append(
                    compare_choices(f"greedy tokens, turn {turn}", a, b, tolerance, step=step, graph=_DECODER)
                )
        self.add(checks, expected, found)
        return found

    def add(self, checks: Sequence[Check], expected: Transcript, found: Transcript) -> None:
        """Take the checks of a rung; the first rung that fails leaves what it computed."""
        is_first = all(check.passed for check in self.checks) and not all(check.passed for check in checks)
        if self._repro is not None and is_first:
            with contextlib.suppress(OSError):  # the verdict counts, also where nothing can be written
                _write_repro(self._repro, self._bundle, self._probe, expected, found, checks)
                self.written = self._repro
        self.checks += checks

    def vision_checks(
        self,
        step: str,
        found: Mapping[str, NDArray[np.float32]],
        expected: Mapping[str, NDArray[np.float32]],
        judged_by: str | None,
    ) -> list[Check]:
        """Compare the tower layer by layer, to tell where features part, and what methods make of features."""
        tolerance = load_tolerances(judged_by or self._dtype)["image_features"]
        return [
            compare_tensors(
                name,
                found[name],
                values,
                tolerance,
                step=step,
                graph=_VISION,
                layer=int(name.rpartition("layers.")[2]) if "layers." in name else None,
            )
            for name, values in expected.items()
        ]

    def stage_checks(
        self,
        step: str,
        kept_tokens: Mapping[str, NDArray[np.int64]],
        choices: Mapping[str, Choice],
        judged_by: str | None,
    ) -> list[Check]:
        """Judge what the vision encoder kept by the scores of the reference, by the names of choosers."""
        tolerance = load_tolerances(judged_by or self._dtype)["scores"]
        if tolerance.norm is not None:
            # How far all scores are off together; no single one is known to be off by more than so much of the largest.
            tolerance = replace(tolerance, norm=None, relative=tolerance.norm)
        return [
            compare_kept(f"kept tokens, {name}", kept_BM, choices[name].score_BN, tolerance, step=step, graph=_VISION)
            for name, kept_BM in kept_tokens.items()
        ]


def _choice_checks(step: str, found: Transcript, expected: Transcript, tolerance: Tolerance) -> list[Check]:
    """Compare scores of vision tokens, and which were kept; where something is quantized, only how far scores are."""
    checks: list[Check] = []
    for number, (a, b) in enumerate(zip(found.choices, expected.choices, strict=True), start=1):
        for layer in b:
            score, kept = (
                functools.partial(compare, step=step, graph=_DECODER, layer=layer)
                for compare in (compare_tensors, compare_kept)
            )
            where = f"image {number}, layer {layer}"
            checks.append(score(f"token scores, {where}", a[layer].score_BN, b[layer].score_BN, tolerance))
            if tolerance.norm is None:
                checks.append(kept(f"kept tokens, {where}", a[layer].kept_BM, b[layer].score_BN, tolerance))
    return checks


def _whole_model_check(session: TransformersSession, probe: Probe, expected: Transcript, dtype: str) -> Check:
    """Compare the step-by-step run of ``transformers`` with one call of the whole model: pixels and ids in."""
    image_token = session.model.config.image_token_index
    num_vision = session.spec.num_vision_tokens
    ids: list[int] = []
    for prompt, answer in zip(probe.prompts, expected.answers, strict=True):
        for token in prompt:
            ids += [image_token] * num_vision if token == IMAGE else [token]
        ids += answer
    with torch.inference_mode():
        pixel_values = torch.from_numpy(probe.pixel_values).to(next(session.model.parameters()).dtype)
        logits = session.model(input_ids=torch.tensor([ids]), pixel_values=pixel_values).logits[0].float().numpy()
    stepwise = np.concatenate(expected.logits)
    return compare_tensors(
        "logits, one call of the whole model",
        stepwise,
        logits,
        load_tolerances(dtype)["logits"],
        step="transformers step by step",
        graph=_DECODER,
    )


def _index_checks(step: str, bundle: Bundle, made: Design) -> list[Check]:
    """Compare the constant indices of the graphs' gathers with those of the recipe's methods."""
    checks: list[Check] = []
    modules = made.modules()
    for graph in (_VISION, _DECODER):
        initializers = ir.load(bundle.graph_path(graph)).graph.initializers
        for name, index in modules[graph].named_buffers():
            if not name.endswith("index_M"):
                continue
            stored = initializers[name].const_value if name in initializers else None
            found = np.empty(0, np.int64) if stored is None else stored.numpy()
            what = f"kept tokens, {name.removesuffix('.index_M')}"
            checks.append(compare_indices(what, found, index.numpy(), step=step, graph=graph))
    return checks


def _rounding_checks(step: str, bundle: Bundle, made: Design) -> list[Check]:
    """Compare the whole numbers in the graphs with those that the checkpoint's weights are rounded to."""
    if not made.recipe.quantize.is_active:
        return []
    checks: list[Check] = []
    weights = made.open_weights()
    with torch.device("meta"):
        modules = made.modules()
    for graph in GRAPHS:
        layers = quantized_layers(graph, modules[graph], made.recipe.quantize)
        names = weight_names(graph, modules[graph], made.model.family)
        initializers = ir.load(bundle.graph_path(graph)).graph.initializers
        wrong: dict[str, int] = {}
        for name, layer in layers.items():
            weight = weights.load(names[name]).float()
            expected = layer.round((weight.T if layer.kind == "matrix" else weight).numpy()).values
            stored = initializers.get(layer.stored_name(name))
            values = np.empty(0) if stored is None or stored.const_value is None else stored.const_value.numpy()
            is_alike = values.shape == expected.shape
            wrong[name] = int((values.astype(np.int8) != expected).sum()) if is_alike else expected.size
        if layers:
            checks.append(compare_counts("rounded weights", wrong, step=step, graph=graph))
    return checks


def _write_repro(
    folder: Path, bundle: Bundle, probe: Probe, expected: Transcript, found: Transcript, checks: Sequence[Check]
) -> None:
    """Leave inputs, both outputs and the checks of the first rung that failed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prompts = {f"prompt_{turn}": np.array(prompt) for turn, prompt in enumerate(probe.prompts, start=1)}
    answers = {f"answer_{turn}": np.array(answer) for turn, answer in enumerate(expected.answers, start=1)}
    _save_arrays(folder / "inputs.npz", {"pixel_values": probe.pixel_values, **prompts, **answers})
    for name, transcript in (("expected", expected), ("found", found)):
        logits = {f"logits_{turn}": values for turn, values in enumerate(transcript.logits, start=1)}
        cache = {
            f"{half}_{layer}": pair[i]
            for layer, pair in enumerate(transcript.cache)
            for i, half in enumerate(("key", "value"))
        }
        _save_arrays(folder / f"{name}.npz", {"image_features": transcript.features, **logits, **cache})
    shutil.copyfile(bundle.path / "recipe.toml", folder / "recipe.toml")
    document = {"versions": library_versions(), "checks": [_finite(asdict(check)) for check in checks]}
    (folder / "checks.json").write_text(json.dumps(document, indent=2) + "\n")


def _save_arrays(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    np.savez_compressed(path, allow_pickle=False, **arrays)  # pyright: ignore[reportArgumentType]


def failure_text(verification: Verification) -> str:
    """Say in one line where the ladder broke."""
    first = verification.first_failure
    assert first is not None
    place = first.graph + (f", layer {first.layer}" if first.layer is not None else "")
    off_by = f"{first.max_abs_diff:.3g}" if first.norm_diff is None else f"{first.norm_diff:.3g} of its norm"
    how = first.note or f"off by {off_by}, tolerance {first.tolerance:.3g}"
    kept = f"; inputs and both outputs are in {verification.repro}" if verification.repro is not None else ""
    reduced = "" if verification.reduced is None else f"; {verification.reduced.text()}"
    return f"parity failed at {first.step}, {place}: {first.name} {how}{kept}{reduced}"


def _finite(table: dict[str, Any]) -> dict[str, Any]:
    """Replace infinities, which JSON does not have."""
    return {key: None if isinstance(value, float) and not np.isfinite(value) else value for key, value in table.items()}
