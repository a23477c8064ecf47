"""The whole story of an export: recipe in, graphs out. Read this first.

``export`` describes the model, plans its tokens, traces three graphs without a weight in memory,
and streams the weights into the files.
"""

import hashlib
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from tokexport.errors import ExportError, RecipeError
from tokexport.exporter.bundle import (
    SCHEMA_VERSION,
    Bundle,
    BundleWriter,
    Manifest,
    ModelRecord,
    library_versions,
)
from tokexport.exporter.checkpoint import (
    Model,
    describe_for_plan,
    describe_model,
    fingerprint,
    open_weights,
    processor_files,
)
from tokexport.exporter.family import Family
from tokexport.exporter.footprint import Footprint, footprint_of, footprint_report
from tokexport.exporter.graph_io import (
    GRAPHS,
    METHOD_PARTS,
    GraphIO,
    GraphName,
    decoder_io,
    embed_tokens_io,
    vision_encoder_io,
)
from tokexport.exporter.method import Method, arriving_plans, load_methods, tables_of
from tokexport.exporter.modules.bottleneck import Bottleneck
from tokexport.exporter.passes.quantize_weights import QuantizeWeights
from tokexport.exporter.plan import TokenPlan, plan_report
from tokexport.exporter.quantization import quantized_layers, require_layers
from tokexport.exporter.trace import bind_weights, trace
from tokexport.exporter.weights import AddedWeights, Weights
from tokexport.recipes.load import recipe_table, recipe_toml
from tokexport.recipes.schema import Recipe

Progress = Callable[[str], None]
Tick = Callable[[int, int], None]
# Reading and converting hide behind writing. Of quantized weights, one waits with the scale of what another rounds.
_WRITERS = 3
_IN_FLIGHT_BYTES = 1 << 29


@dataclass(frozen=True)
class Design:
    """A recipe that was checked against its model: everything an export or a reference is made from."""

    recipe: Recipe
    model: Model
    methods: tuple[Method, ...]
    plans: tuple[TokenPlan, ...]

    @property
    def plan(self) -> TokenPlan:
        return self.plans[-1]

    def modules(self) -> dict[GraphName, nn.Module]:
        """Return the module of each graph, on the device that is the default."""
        family, config = self.model.family, self.model.config
        grid = self.model.spec.vision_grid
        for method, arriving in self._steps():
            grid = method.tower_grid(self.model.spec, arriving) or grid
        assert math.prod(grid) == self.plan.emitted, (grid, self.plan)
        stages = {
            method.name: stage
            for method, arriving in self._steps()
            if (stage := method.feature_stage(self.model.spec, arriving)) is not None
        }
        return {
            "vision_encoder": family.vision_encoder(config, grid, stages),
            "embed_tokens": family.token_embedding(config),
            "decoder_model_merged": family.decoder(config, self._bottlenecks()),
        }

    @property
    def choosing_layers(self) -> tuple[int, ...]:
        """The decoder layers before which tokens are chosen by attention."""
        with torch.device("meta"):
            bottlenecks = self._bottlenecks()
        return tuple(sorted(layer for layer, bottleneck in bottlenecks.items() if bottleneck.look is not None))

    def footprint(self, modules: Mapping[GraphName, nn.Module]) -> Footprint:
        """Return what the artefact takes on disk and in memory, given its modules."""
        files = processor_files(self.model.directory)
        return footprint_of(modules, self.recipe, self.model.spec.num_layers, files)

    def open_weights(self, of_model: Weights | None = None) -> Weights:
        """Open the weights of the model and of its methods.

        Args:
            of_model: those of the model where they are open already.

        Raises:
            CheckpointError: they are missing, damaged or do not fit.
        """
        return AddedWeights(open_weights(self.model) if of_model is None else of_model, self._learned())

    def fingerprint(self) -> str:
        """Return a SHA-256 that tells weights apart, the model's and what methods learned."""
        digest = hashlib.sha256(fingerprint(self.model).encode())
        for name, tensor in sorted(self._learned().items()):
            digest.update(name.encode() + tensor.float().numpy().tobytes())
        return digest.hexdigest()

    def base(self) -> "Design":
        """Return the design of the checkpoint alone, without an adapter and without compression."""
        model = replace(self.model, table=replace(self.model.table, adapter=None))
        recipe = replace(self.recipe, model=model.table, compress=())
        return Design(recipe, model, (), self.plans[:1])

    def graph_io(self) -> dict[GraphName, GraphIO]:
        """Return the inputs and outputs of each graph."""
        spec, dtype = self.model.spec, self.recipe.export.dtype
        return {
            "vision_encoder": vision_encoder_io(spec, self.plan, dtype),
            "embed_tokens": embed_tokens_io(spec, dtype),
            "decoder_model_merged": decoder_io(spec, self.plan, dtype, self.choosing_layers),
        }

    def _bottlenecks(self) -> dict[int, Bottleneck]:
        bottlenecks: dict[int, Bottleneck] = {}
        for method, arriving in self._steps():
            added = method.bottlenecks(self.model.spec, arriving)
            taken = sorted(bottlenecks.keys() & added.keys())
            if taken:
                raise RecipeError(f"two methods have a bottleneck before layer {taken[0]}; move one of them")
            bottlenecks |= added
        return bottlenecks

    def _learned(self) -> dict[str, Tensor]:
        return {
            f"{method.learner}.{name}": tensor.detach()
            for method, arriving in self._steps()
            for name, tensor in method.learned(self.model.spec, arriving).items()
        }

    def _steps(self) -> Sequence[tuple[Method, TokenPlan]]:
        return list(zip(self.methods, self.plans, strict=False))


def design(recipe: Recipe, *, describe: Callable[..., Model] = describe_model) -> Design:
    """Check a recipe against its model.

    Raises:
        RecipeError: the recipe does not fit the model.
        CheckpointError: the model cannot be read.
    """
    model = describe(recipe.model)
    methods = tuple(method.settled() for method in load_methods(recipe.compress))
    if recipe.model.num_layers is not None:
        methods = tuple(method.for_num_layers(model.num_layers_before_cut, model.spec.num_layers) for method in methods)
    recipe = replace(recipe, model=model.table, compress=tables_of(methods))
    return Design(recipe, model, methods, arriving_plans(methods, model.spec))


def export(
    made: Design,
    writer: BundleWriter,
    progress: Progress = lambda _: None,
    *,
    written: Tick = lambda _done, _total: None,
    twin: Bundle | None = None,
) -> Bundle:
    """Write the graphs, the weights, the recipe and the manifest into the writer's staging folder.

    Args:
        made: what to export.
        writer: where to.
        progress: told what is being done.
        written: told how many bytes of a graph's weights are written.
        twin: an artefact of the same weights; its weight files are linked instead of written.

    Raises:
        CheckpointError: the weights do not fit.
        BundleError: the disk has too little room, which is found out first, or is not writable.
        ExportError: a graph breaks what the manifest would promise.
    """
    with torch.device("meta"):
        modules = made.modules()
    require_layers(modules, made.recipe.quantize)
    footprint = made.footprint(modules)
    if twin is None:
        writer.require_room(footprint.room_bytes, footprint.disk_text())
    progress("reading the checkpoint")
    weights = made.open_weights()
    num_parameters = sum(math.prod(shape) for shape in weights.shapes.values())
    interfaces = made.graph_io()
    for graph in GRAPHS:
        progress(f"tracing {graph}")
        model, bound = _traced(graph, modules[graph], interfaces[graph], made, weights)
        progress(f"writing {graph}")
        if twin is None:
            _store_weights(model, bound, writer.staging / "onnx", f"{graph}.onnx_data", written)
        else:
            _share_weights(model, bound, twin.graph_path(graph), writer.staging / "onnx")
        ir.save(model, writer.staging / "onnx" / f"{graph}.onnx")
        if twin is None:  # the checker takes a linked weight file for an attack
            _check(writer.staging / "onnx" / f"{graph}.onnx")
    for path in processor_files(made.model.directory):
        shutil.copyfile(path, writer.staging / path.name)
    made.model.config.to_json_file(writer.staging / "config.json", use_diff=False)
    (writer.staging / "recipe.toml").write_text(recipe_toml(made.recipe), encoding="utf-8")
    progress("hashing files")
    bundle = writer.write_manifest(
        Manifest(
            schema_version=SCHEMA_VERSION,
            versions=library_versions(),
            model=ModelRecord(
                checkpoint=made.model.table.checkpoint,
                weights=made.model.table.weights,
                fingerprint=made.fingerprint(),
                num_parameters=num_parameters,
                base_fingerprint=made.base().fingerprint(),
            ),
            recipe=recipe_table(made.recipe),
            spec=made.model.spec,
            plan=made.plan,
            graphs={str(graph): io for graph, io in interfaces.items()},
        )
    )
    bundle.write_report("plan.json", _plan_report(made, footprint, made.recipe.plan.text_tokens))
    return bundle


def planned(recipe: Recipe, *, text_tokens: int | None = None) -> tuple[Design, dict[str, Any]]:
    """Plan a recipe without reading weights, and without the checkpoint where the recipe describes it.

    Returns:
        The design and what ``tokexport plan --json`` prints.
    """
    made = design(recipe, describe=describe_for_plan)
    text_tokens = recipe.plan.text_tokens if text_tokens is None else text_tokens
    with torch.device("meta"):
        modules = made.modules()
    require_layers(modules, made.recipe.quantize)
    return made, _plan_report(made, made.footprint(modules), text_tokens)


def _plan_report(made: Design, footprint: Footprint, text_tokens: int) -> dict[str, Any]:
    spec, recipe = made.model.spec, made.recipe
    report = plan_report(spec, made.plan, text_tokens=text_tokens, dtype=recipe.export.dtype)
    sizes = footprint_report(footprint, spec, made.plan, recipe, text_tokens)
    return {"recipe": recipe.name, "checkpoint": recipe.model.checkpoint, **report, **sizes}


def weight_names(graph: GraphName, module: nn.Module, family: Family) -> dict[str, str]:
    """Return, for every parameter of a graph's module, its canonical name."""
    names: dict[str, str] = {}
    for name, _ in module.named_parameters():
        for prefix, canonical in {**family.weight_prefixes[graph], **{part: part for part in METHOD_PARTS}}.items():
            if name.startswith(prefix):
                names[name] = canonical + name.removeprefix(prefix)
    return names


def _traced(
    graph: GraphName, module: nn.Module, io: GraphIO, made: Design, weights: Weights
) -> tuple[ir.Model, list[str]]:
    """Return the graph and the names of its weights, which are not read yet."""
    dtype = made.recipe.export.dtype
    model = trace(module, io, dtype=dtype, vision=made.plan.entering_llm)
    model.graph.name = graph
    model.producer_name, model.producer_version = "tokexport", library_versions().get("tokexport", "")
    bound = bind_weights(model, weights, weight_names(graph, module, made.model.family), dtype)
    quantize = QuantizeWeights(
        {bound[name]: layer for name, layer in quantized_layers(graph, module, made.recipe.quantize).items()}
    )
    quantize(model)
    # What a method learned is small and not shared with an artefact without it, so it stays in the graph's file.
    names = [name for parameter, name in bound.items() if not parameter.startswith(METHOD_PARTS)]
    return model, [stored for name in names for stored in quantize.stored.get(name, (name,))]


def _store_weights(model: ir.Model, bound: Sequence[str], folder: Path, file_name: str, written: Tick) -> None:
    """Read the weights one by one; while one is written the next is read and converted."""
    values = [model.graph.initializers[name] for name in bound]
    tensors = [value.const_value for value in values if value.const_value is not None]
    total, done = sum(tensor.nbytes for tensor in tensors), 0

    def count(tensor: ir.TensorProtocol, _: object) -> None:
        nonlocal done
        written(done, total)
        done += tensor.nbytes

    external = ir.external_data.convert_tensors_to_external(
        tensors, folder, file_name, count, max_workers=_WRITERS, max_in_flight_bytes=_IN_FLIGHT_BYTES
    )
    for value, tensor in zip(values, external, strict=True):
        value.const_value = tensor


def _share_weights(model: ir.Model, bound: Sequence[str], twin: Path, folder: Path) -> None:
    """Refer to the weights of another artefact's graph, through hard links where the disk allows it."""
    stored = ir.load(twin).graph.initializers
    for name in bound:
        model.graph.initializers[name].const_value = stored[name].const_value
    data = twin.with_name(f"{twin.name}_data")
    try:
        (folder / data.name).hardlink_to(data)
    except OSError:
        shutil.copyfile(data, folder / data.name)


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"{path} does not pass the ONNX checker ({error}); please report this with the recipe"
        ) from error
