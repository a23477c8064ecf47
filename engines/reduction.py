"""The smallest part of a decoder graph in which an engine and the portable graph differ.

An engine is given the portable graph rewritten. What has the same name in both must be the same numbers. So every part
that lies between neighbouring common values is run alone in the engine, on the numbers that the portable graph computed
before it, and judged by the numbers behind it. Where no part differs beyond the tolerance, parts twice as deep are
tried, up to about two layers. The first that differs is left in a folder, in Polygraphy's formats:

```
engine.onnx      the part as the engine is given it, weights inside
portable.onnx    the same in the portable graph
inputs.json      what goes in
expected.json    what the portable graph makes of it
```
Weights are read only for the parts that are run.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from tokexport.engines.backend import Array, DecoderStep, Rewriter, SessionOptions, load_backend
from tokexport.engines.compare import Check, Tolerance, compare_tensors, load_tolerances
from tokexport.engines.generate import IMAGE, Conversation
from tokexport.engines.graph_parts import Part, Reduction, common_values, is_same_node, part_before, part_graph
from tokexport.engines.ort_session import OrtSession, graph_file, inference_session
from tokexport.engines.parity import Progress
from tokexport.engines.probe import Probe
from tokexport.errors import BackendUnavailableError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.graph_io import CHOICES, GraphName
from tokexport.recipes.schema import Recipe

_DECODER: GraphName = "decoder_model_merged"
# Values on the way through a part; two layers have about so many.
_DEEPEST = 64
Arrays = Mapping[str, Array]


def require_reducible(backend: str, recipe: Recipe) -> Rewriter:
    """Return the engine, or find out before the work what would stop it.

    Raises:
        BackendUnavailableError: Polygraphy is missing, the engine does not run parts of graphs, or weights are rounded.
    """
    try:
        import polygraphy.backend.onnxrt  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise BackendUnavailableError(
            "--reduce needs Polygraphy; install it with: pip install 'tokexport[debug]'"
        ) from error
    engine = load_backend(backend)
    if not isinstance(engine, Rewriter):
        raise BackendUnavailableError(
            f"backend {backend!r} runs no rewritten graph of which parts can be run alone; leave --reduce out, or "
            "take --backend ort or ort-cuda"
        )
    if recipe.quantize.is_active:
        raise BackendUnavailableError(
            "--reduce compares exact graphs, and this artefact is quantized; leave it out, or build without --quantize"
        )
    return engine


def reduce_failure(
    bundle: Bundle,
    backend: str,
    options: SessionOptions,
    probe: Probe,
    folder: Path,
    *,
    progress: Progress = lambda _: None,
) -> Reduction | None:
    """Look for the smallest part of the decoder that differs, and leave it in ``folder``.

    Args:
        bundle: the artefact.
        backend: the engine that differs.
        options: threads; room is made for the probe.
        probe: the conversation that both hold.
        folder: made; what stands there is replaced.
        progress: told what is being run.

    Returns:
        The part, None where no part differs alone beyond the tolerance.

    Raises:
        BackendUnavailableError: see ``require_reducible``.
    """
    search = _Search(bundle, require_reducible(backend, bundle.recipe), options.threads)
    num_images = sum(prompt.count(IMAGE) for prompt in probe.prompts)
    num_text = sum(len(prompt) + 1 for prompt in probe.prompts) - num_images
    options = replace(options, max_text_tokens=num_text, max_images=num_images)
    for call, inputs in _calls(bundle, options, probe):
        progress(f"looking for the part of {_DECODER} that differs, {call}")
        found = search.first_difference(inputs)
        if found is not None:
            return search.left_in(folder, found, call)
    return None


@dataclass(frozen=True)
class _Difference:
    part: Part
    inputs: Arrays
    expected: Arrays
    check: Check


class _Search:
    """Both decoder graphs of an artefact, and what runs parts of them."""

    def __init__(self, bundle: Bundle, engine: Rewriter, threads: int | None) -> None:
        self._bundle, self._engine, self._threads = bundle, engine, threads
        self._portable = ir.load(bundle.graph_path(_DECODER))
        self._rewritten = ir.from_proto(onnx.load_from_string(engine.decoder_graph(bundle)))
        ir.external_data.set_base_dir(self._rewritten.graph, bundle.path / "onnx")
        self._tolerances = load_tolerances(bundle.recipe.export.dtype)
        self._common = common_values(self._rewritten.graph, self._portable.graph)
        self._call: Arrays = {}

    def first_difference(self, inputs: Arrays) -> _Difference | None:
        """Return the first part, of those that are as small as can be, that differs for a call's inputs."""
        self._call = inputs
        if not self._whole_differs():
            return None
        depth = 1
        while depth <= _DEEPEST:
            parts = dict.fromkeys(
                part_before(self._rewritten.graph, name, self._common, depth) for name in self._common
            )
            # On one device in one library, the same operators compute the same.
            differing = [part for part in parts if self._engine.device != "cpu" or not self._is_same(part)]
            values = self._portable_values([name for part in differing for name in (*part.inputs, *part.outputs)])
            for part in differing:
                given = {name: values[name] for name in part.inputs}
                expected = {name: values[name] for name in part.outputs}
                graph = ir.to_proto(part_graph(self._rewritten, part, given)).SerializeToString()
                check = self._worst(_run_alone(graph, given, self._engine.device), expected)
                if not check.passed:
                    return _Difference(part, given, expected, check)
            depth *= 2
        return None

    def _whole_differs(self) -> bool:
        names = [value.name or "" for value in self._rewritten.graph.outputs]
        graph, folder = self._engine.decoder_graph(self._bundle), self._bundle.path / "onnx"
        session = inference_session(graph, folder, threads=self._threads, device=self._engine.device)
        found = dict(zip(names, map(np.asarray, session.run(names, dict(self._call))), strict=True))
        return not self._worst(found, self._portable_values(names)).passed

    def left_in(self, folder: Path, found: _Difference, call: str) -> Reduction:
        """Write a part with what it is given and what is expected of it."""
        from polygraphy.json import save_json
        from polygraphy.logger import G_LOGGER

        folder.mkdir(parents=True, exist_ok=True)
        # The portable graph may need other values too, like where in the cache it writes.
        portable = part_before(self._portable.graph, found.part.outputs, set(found.part.inputs), 1)
        missing = [name for name in portable.inputs if name not in found.inputs]
        given = {**found.inputs, **{name: self._call[name] for name in missing}}
        for name, model, part in (("engine", self._rewritten, found.part), ("portable", self._portable, portable)):
            ir.save(part_graph(model, part, given), folder / f"{name}.onnx")
        with G_LOGGER.verbosity(G_LOGGER.ERROR):
            save_json([given], str(folder / "inputs.json"))
            save_json(_run_results(found.expected), str(folder / "expected.json"))
        command = shlex.join(
            [
                *("polygraphy", "run", str(folder / "engine.onnx"), "--onnxrt", "--providers", self._engine.device),
                *("--load-inputs", str(folder / "inputs.json"), "--load-outputs", str(folder / "expected.json")),
                *("--atol", f"{found.check.tolerance:.3g}", "--rtol", "0"),
            ]
        )
        return Reduction(
            folder=folder,
            nodes=tuple(node.op_type for node in found.part.nodes),
            portable_nodes=tuple(node.op_type for node in portable.nodes),
            call=call,
            check=found.check,
            command=command,
        )

    def _is_same(self, part: Part) -> bool:
        portable = {node.outputs[0].name: node for node in self._portable.graph}
        return all(is_same_node(node, portable.get(node.outputs[0].name)) for node in part.nodes)

    def _portable_values(self, names: Sequence[str]) -> Arrays:
        """Return what the portable graph computes, and is given, under these names."""
        wanted = [name for name in dict.fromkeys(names) if name not in self._call]
        given = {name: self._call[name] for name in names if name in self._call}
        if not wanted:
            return given
        model = ir.load(self._bundle.graph_path(_DECODER))
        there = ir.convenience.create_value_mapping(model.graph)
        model.graph.outputs.extend(there[name] for name in wanted if not there[name].is_graph_output())
        graph = ir.to_proto(model).SerializeToString()
        session = inference_session(graph, self._bundle.path / "onnx", threads=self._threads)
        return {**given, **dict(zip(wanted, map(np.asarray, session.run(wanted, dict(self._call))), strict=True))}

    def _worst(self, found: Arrays, expected: Arrays) -> Check:
        checks = [
            compare_tensors(name, found[name], value, self._tolerance(name), step=self._engine.name, graph=_DECODER)
            for name, value in expected.items()
        ]
        return max(checks, key=lambda check: (not check.passed, check.max_abs_diff / (check.tolerance or 1)))

    def _tolerance(self, name: str) -> Tolerance:
        if name.startswith("present."):
            return self._tolerances["cache"]
        return self._tolerances["scores" if name.startswith(CHOICES[0]) else "logits"]


def _calls(bundle: Bundle, options: SessionOptions, probe: Probe) -> Iterator[tuple[str, Arrays]]:
    """Yield name and inputs of every prompt's call and of the call behind it, from the portable graph."""

    class Watched(OrtSession):
        inputs: Arrays = {}  # noqa: RUF012 - replaced, never changed

        def decode(self, step: DecoderStep) -> NDArray[np.float32]:
            dtype = np.dtype(bundle.recipe.export.dtype)
            given = {
                name: array.astype(dtype) if np.issubdtype(array.dtype, np.floating) else array
                for name, array in step.inputs().items()
            }
            self.inputs = {**given, **self.cache_arrays()}
            return super().decode(step)

    session = Watched(bundle, options, graph_file(bundle, _DECODER))
    features, used = session.encode_images(probe.pixel_values), 0
    conversation = Conversation(session)
    for turn, prompt in enumerate(probe.prompts, start=1):
        count = prompt.count(IMAGE)
        logits = conversation.feed(prompt, [features[i : i + 1] for i in range(used, used + count)], all_logits=True)
        used += count
        yield f"prompt of turn {turn}", session.inputs
        conversation.feed([int(logits[-1].argmax())])
        yield f"first token of turn {turn}", session.inputs


def _run_alone(graph: bytes, given: Arrays, provider: str) -> dict[str, Array]:
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.ERROR), OnnxrtRunner(SessionFromOnnx(graph, providers=[provider])) as runner:
        return dict(runner.infer(dict(given)))


def _run_results(outputs: Arrays) -> Any:
    from polygraphy.comparator import IterationResult, RunResults

    results = RunResults()
    results.append(("portable graph", [IterationResult(dict(outputs), runner_name="portable graph")]))
    return results
