"""What compression gains on an NVIDIA GPU: LLaVA-1.5-7B, random weights, float16, every engine that is there.

Builds the model with all vision tokens, with ADSC and with MetaCompress, proves each against the engines that run its
graphs, and measures the time to the first token, the time per token and the memory of the GPU. Each arm has the GPU to
itself; one that fails is a row with its reason. Figures are kept after every arm, and a second run does only what is
missing. Run from the root of the repository: ``python benchmarks/gpu.py``. A smaller GPU takes ``--num-layers``;
``--device cpu`` runs everything but the kernels on a small model, to try the script.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import click
import torch

from tokexport.engines.backend import Compiler, SessionOptions, list_backends, load_backend
from tokexport.engines.bench import Arm, measure_arms
from tokexport.engines.build import build, verify_artefact
from tokexport.engines.environment import describe_environment, missing_gpu
from tokexport.engines.parity import failure_text
from tokexport.engines.tensorrt.library import Library
from tokexport.engines.worker import Workload
from tokexport.errors import BackendUnavailableError, ParityError, TokexportError
from tokexport.exporter.bundle import Bundle
from tokexport.recipes.load import load_recipe, override
from tokexport.recipes.schema import Recipe

Device = Literal["cuda", "cpu"]

_METHODS = ("full", "adsc", "metacompress")
ENGINES: Mapping[Device, tuple[str, ...]] = {
    "cuda": ("torch-cuda", "torch-cuda-graph", "ort-cuda", "tensorrt", "tensorrt-rtx"),
    "cpu": ("torch-eager", "ort-portable", "ort", "tensorrt-rtx"),
}
_SMALL = ("hidden_size=64", "intermediate_size=96", "num_attention_heads=4", "num_key_value_heads=4", "head_dim=16")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is measured, and where its figures go."""

    device: Device
    num_layers: int
    workload: Workload
    repeats: int
    with_verify: bool
    out: Path

    @property
    def dtype(self) -> str:
        """Precision of the graphs; CPU kernels for float16 are no faster, and some are missing."""
        return "float16" if self.device == "cuda" else "float32"

    def recipe(self, method: str) -> Recipe:
        """Return the recipe of a method at the model's size."""
        # Random weights learned nothing.
        settings = ["compress.0.weights=untrained"] if method == "metacompress" else []
        if self.device == "cpu":
            settings += [f"model.architecture.text_config.{size}" for size in _SMALL]
        loaded = load_recipe(f"{'llava15' if self.device == 'cuda' else 'bench'}_{method}", settings)
        return override(loaded, weights="random", num_layers=self.num_layers, dtype=self.dtype)

    @property
    def settings(self) -> dict[str, Any]:
        """What figures of another run must share to stand in one table."""
        return {"num_layers": self.num_layers, "dtype": self.dtype, **asdict(self.workload), "repeats": self.repeats}


class Record:
    """The figures so far, written after every arm."""

    def __init__(self, path: Path, head: Mapping[str, Any]) -> None:
        self._path, self.arms = path, dict[str, dict[str, Any]]()
        self.document: dict[str, Any] = {**head, "arms": self.arms}
        if path.is_file():
            before = json.loads(path.read_text())
            for key in ("settings", "gpus"):
                if before[key] != head[key]:
                    raise click.ClickException(
                        f"{path} holds figures for {key} {before[key]}, not {head[key]}; choose another --out"
                    )
            self.arms.update(before["arms"])

    def needs(self, key: str) -> bool:
        """Return whether an arm is missing, or failed and may succeed now."""
        return "failed" in self.arms.get(key, {"failed": ""})

    def put(self, key: str, arm: Mapping[str, Any]) -> None:
        """Keep what an arm gave, also if this run ends before the next."""
        self.arms[key] = dict(arm)
        text = json.dumps(self.document, indent=2) + "\n"
        half = self._path.with_suffix(".part")
        half.write_text(text)
        half.replace(self._path)
        self._path.with_suffix(".md").write_text(table(self.document))


def table(document: Mapping[str, Any]) -> str:
    """Return the figures as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in document["environment"]["versions"].items())
    lines = [
        f"{'; '.join(document['gpus']) or document['environment']['cpu']}; {versions}",
        "",
        f"{json.dumps(document['settings'])}. TensorRT-RTX on this GPU: {document['tensorrt_rtx']}.",
        "",
        "| engine | method | tokens a layer | first token, ms | prefill, ms | a token, ms | GPU memory, GB | proved |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for key, arm in document["arms"].items():
        engine, method = key.split(" ")
        if "failed" in arm:
            lines.append(f"| {engine} | {method} | {arm['failed'].replace('|', '/')} | | | | | |")
            continue
        memory = "–" if arm["device_bytes"] is None else f"{arm['device_bytes'] / 1e9:.2f}"
        figures = (arm["ttft_ms"]["median"], arm["prefill_ms"], arm["decode_ms_per_token"])
        cells = [f"{arm['mean_vision_tokens']:g}", *(f"{figure:.2f}" for figure in figures), memory, arm["proved"]]
        lines.append(f"| {engine} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def measure(run: Run, bundle: Bundle, engine: str, method: str) -> dict[str, Any]:
    """Compile, prove and measure one arm.

    Raises:
        TokexportError: one of these cannot be done, or the proof fails.
    """
    backend = load_backend(engine)
    reason = backend.state()
    if reason and not isinstance(backend, Compiler):
        raise BackendUnavailableError(reason)
    room = run.workload.text_tokens + run.workload.new_tokens
    options = SessionOptions.for_bundle(bundle, max_text_tokens=room, max_images=1)
    if isinstance(backend, Compiler) and not any((bundle.path / "engines").glob(f"{engine}-*")):
        # The proof runs the same engine, and holds more text and two images.
        backend.compile(bundle, replace(options, max_text_tokens=max(room, 256), max_images=2), progress=_say)
    if reason:
        raise BackendUnavailableError(reason)
    proved = "–"
    if run.with_verify and backend.runs_graphs:
        _say(f"proving {engine} {method}")
        verification = verify_artefact(bundle.path, backend=engine, progress=_say)
        if not verification.passed:
            raise ParityError(failure_text(verification))
        proved = "yes"
    arm = Arm(bundle=bundle, engine=engine, method=method)
    (row,) = measure_arms([arm], options, run.workload, run.repeats, _say, lambda _done, _total: None)
    return {**row, "proved": proved}


def artefact(run: Run, method: str) -> Bundle:
    """Return the artefact of a method, built where it is not there yet."""
    path = run.out / method
    if not path.is_dir():
        build(run.recipe(method), path, with_verify=False, with_bench=False, progress=_say)
    return Bundle.open(path)


def rtx_state() -> str:
    """Return whether TensorRT-RTX builds and loads an engine of one operator on the GPU in this machine."""
    try:
        trt = Library.load("tensorrt_rtx", "tensorrt-rtx", "rtx").module
    except BackendUnavailableError as error:
        return str(error)
    if not torch.cuda.is_available():
        return "no GPU to try it on"
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    value = network.add_input("x", trt.float32, (1, 4))
    network.mark_output(network.add_identity(value).get_output(0))
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    if plan is None:
        return "it builds nothing for this GPU"
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    context = None if engine is None else engine.create_execution_context()
    return "runs" if context is not None else "it loads nothing on this GPU"


def require_gpu() -> None:
    """Say what of a GPU is missing.

    Raises:
        ClickException: something is.
    """
    missing = missing_gpu()
    if missing:
        raise click.ClickException(f"this benchmark cannot run here: {missing}; to try the script: --device cpu")


@click.command()
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option(
    "--num-layers",
    type=click.IntRange(min=4, max=32),
    help="Of the decoder, by default 32; a layer takes 0.4 GB. On the CPU 4.",
)
@click.option("--method", "methods", multiple=True, type=click.Choice(_METHODS), help="By default all.")
@click.option("--engine", "engines", multiple=True, help="By default all that the device has.")
@click.option("--text-tokens", default=64, show_default=True, type=click.IntRange(min=1))
@click.option("--new-tokens", default=64, show_default=True, type=click.IntRange(min=1))
@click.option("--repeats", default=7, show_default=True, type=click.IntRange(min=1))
@click.option("--verify/--no-verify", "with_verify", default=True, help="Prove the arms that run graphs.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/gpu"), show_default=True)
def main(
    device: Device,
    num_layers: int | None,
    methods: Sequence[str],
    engines: Sequence[str],
    text_tokens: int,
    new_tokens: int,
    repeats: int,
    with_verify: bool,
    out: Path,
) -> None:
    """Build, prove and measure every arm, and write results.json and results.md."""
    unknown = [engine for engine in engines if engine not in list_backends()]
    if unknown:
        raise click.ClickException(f"there is no engine {unknown[0]!r}; choose from: {', '.join(list_backends())}")
    if device == "cuda":
        require_gpu()
    run = Run(
        device=device,
        num_layers=num_layers or (32 if device == "cuda" else 4),
        workload=Workload(text_tokens=text_tokens, new_tokens=new_tokens),
        repeats=repeats,
        with_verify=with_verify,
        out=out,
    )
    out.mkdir(parents=True, exist_ok=True)
    environment = describe_environment()
    head = {
        "settings": run.settings,
        "gpus": list(environment.gpus),
        "environment": asdict(environment),
        "tensorrt_rtx": rtx_state(),
    }
    record = Record(out / "results.json", head)
    for method in methods or _METHODS:
        for engine in engines or ENGINES[device]:
            key = f"{engine} {method}"
            if not record.needs(key):
                continue
            _say(key)
            try:
                record.put(key, measure(run, artefact(run, method), engine, method))
            except TokexportError as error:
                record.put(key, {"failed": str(error)})
            except Exception as error:  # noqa: BLE001 - whatever a library throws, the other arms go on
                record.put(key, {"failed": " ".join(f"{type(error).__name__}: {error}".split())})
    click.echo(table(record.document), nl=False)


def _say(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    main()
