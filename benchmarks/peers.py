"""tokexport beside what users would pick instead: one checkpoint, image, prompt and number of threads, in one run.

Peers are ``transformers``, OpenVINO by hand, OpenVINO GenAI and llama.cpp: a script each in ``benchmarks/peers/``, each
in the Python that ``--python`` names; ``benchmarks/peers-requirements.txt`` says what that has to hold. The checkpoint
has random weights and is written first; peers convert it as their users would. Whoever computes with weights of as many
bits is open at once, all tokens and fewer apart, in processes of their own that take turns; with ``--one-at-a-time``
alone, one after the other, where memory holds no more. A peer that cannot be had is a row with its reason. Run from the
root of the repository:
``python -m benchmarks.peers --python PEERS/bin/python -o out/peers``.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np

from benchmarks.peers_choice import (
    BITS,
    PEERS,
    Bits,
    Peer,
    chosen_engines,
    chosen_peers,
    chosen_recipes,
    named_pythons,
)
from benchmarks.peers_process import PeerProcess
from benchmarks.peers_table import pairs, table
from tokexport.engines.backend import DEFAULT_BACKEND, SessionOptions
from tokexport.engines.environment import available_cores, describe_environment
from tokexport.engines.worker import EngineProcess, Timing, Workload, make_question
from tokexport.errors import BundleError, TokexportError
from tokexport.exporter.bundle import Bundle, BundleWriter, write_atomically
from tokexport.exporter.plan import TokenPlan, stride_index
from tokexport.recipes.load import override, recipe_table
from tokexport.recipes.schema import Recipe

# The processes of our engines import this module too, and their memory is measured: what loads torch is imported where
# it is used.

Bundles = Mapping[tuple[str, Bits], Bundle]
"""Our artefacts, by recipe and bits."""

OURS, FULL = "tokexport", "all"
_WARMUP = 1
_RECIPES = ("bench_full", "bench_adsc", "bench_metacompress")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One row: a system in one precision, and the image tokens it computes with.

    Attributes:
        method: the recipe's, for ours; what the peer's tokens are chosen to match, for a peer.
        tokens: of an image, averaged over the decoder's layers.
        kept: which of them enter the language model of a peer, None for all.
        engine: that runs an artefact of ours.
    """

    system: str
    variant: str
    bits: Bits
    method: str
    tokens: float
    kept: tuple[int, ...] | None = None
    engine: str = ""

    @property
    def group(self) -> tuple[Bits, bool]:
        """Arms of one group take turns."""
        return self.bits, self.method == FULL


class Contestant(Protocol):
    """An opened arm."""

    def measure(self) -> Mapping[str, Any]:
        """Return the milliseconds of one answer."""
        ...

    def footprint(self) -> Mapping[str, Any]:
        """Return bytes of memory and disk."""
        ...


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all arms share."""

    out: Path
    checkpoint: Path
    workload: Workload
    threads: int
    repeats: int
    peers: Mapping[str, Peer]
    pythons: Mapping[str, str]
    limit_s: float
    vision_tokens: int

    @property
    def max_tokens(self) -> int:
        """Room for prompt and answer, and the run before that gets warm."""
        return self.vision_tokens + self.workload.text_tokens + self.workload.new_tokens + 8

    def python(self, peer: str) -> str:
        """Return the interpreter of a peer."""
        return self.pythons.get(peer, self.pythons.get("", sys.executable))


class OurProcess:
    """An artefact of ours in one of our engines."""

    def __init__(self, bundle: Bundle, engine: str, setting: Setting, stack: ExitStack) -> None:
        room = setting.workload.text_tokens + setting.workload.new_tokens
        options = SessionOptions.for_bundle(bundle, max_text_tokens=room, max_images=1, threads=setting.threads)
        self._bundle = bundle
        self._process = stack.enter_context(EngineProcess(bundle.path, engine, options, setting.workload))

    def measure(self) -> Mapping[str, Any]:
        timing: Timing = self._process.measure()
        return asdict(timing)

    def footprint(self) -> Mapping[str, Any]:
        disk = sum(path.stat().st_size for path in (self._bundle.path / "onnx").iterdir())
        return {"peak_rss_bytes": self._process.footprint().peak_rss_bytes, "disk_bytes": disk}


def artefact(recipe: Recipe, path: Path, twin: Bundle | None) -> Bundle:
    """Return the artefact of a recipe, made where it does not stand there; weights are shared with its twin."""
    from tokexport.exporter.export import design, export

    made = design(recipe)
    try:
        bundle = Bundle.open(path)
    except BundleError:
        bundle = None
    is_same = bundle is not None and bundle.manifest.recipe == recipe_table(made.recipe)
    if bundle is not None and is_same and bundle.manifest.model.fingerprint == made.fingerprint():
        return bundle
    with BundleWriter(path, overwrite=True) as writer:
        export(made, writer, twin=twin)
        return writer.commit()


def our_artefacts(recipes: Sequence[Recipe], setting: Setting, bits: Sequence[Bits]) -> dict[tuple[str, Bits], Bundle]:
    """Return our artefacts, by recipe and bits, the one with all tokens first."""
    from tokexport.exporter.export import design

    bundles: dict[tuple[str, Bits], Bundle] = {}
    for width in bits:
        twin = None
        for recipe in recipes:
            path = setting.out / "artefacts" / f"{recipe.name}_{width}"
            _say(f"making {path.name}")
            # A cut model is a whole one in the checkpoint; the design has it, and its methods, resolved.
            mine = override(
                design(recipe).recipe,
                model=str(setting.checkpoint.absolute()),
                dtype="float32",
                quantize=None if width == "float" else width,
            )
            bundle = artefact(mine, path, twin)
            twin = twin or bundle
            bundles[recipe.name, width] = bundle
    return bundles


def all_arms(bundles: Bundles, peers: Mapping[str, Peer], engines: Mapping[str, Sequence[Bits]]) -> list[Arm]:
    """Return every row, ours behind the peers of their group."""
    plans: dict[str, TokenPlan] = {recipe: bundle.plan for (recipe, _), bundle in bundles.items()}
    methods = {recipe: _method(bundle) for (recipe, _), bundle in bundles.items()}
    widths: list[Bits] = list(dict.fromkeys(width for _, width in bundles))
    arms: list[Arm] = []
    for width in widths:
        for recipe, plan in plans.items():
            tokens, method = plan.mean_vision_tokens, methods[recipe]
            kept = None if method == FULL else stride_index(plan.emitted, round(tokens), 0.5)
            for name, peer in peers.items():
                variants = [variant for variant, bits in peer.variants.items() if bits == width]
                arms += [
                    Arm(
                        system=name,
                        variant=variant,
                        bits=width,
                        method=method,
                        tokens=tokens if kept is None else len(kept),
                        kept=kept,
                    )
                    for variant in variants
                    if kept is None or variant in peer.prunes
                ]
            variant = "fp32" if width == "float" else width
            arms += [
                Arm(
                    system=OURS,
                    variant=variant if name == DEFAULT_BACKEND else f"{variant} {name}",
                    bits=width,
                    method=method,
                    tokens=tokens,
                    engine=name,
                )
                for name, widths_run in engines.items()
                if width in widths_run
            ]
    return arms


def _method(bundle: Bundle) -> str:
    return "+".join(step.method for step in bundle.recipe.compress) or FULL


def peer_task(arm: Arm, setting: Setting, question: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a peer is told, see ``benchmarks/peers/serving.py``."""
    peer = setting.peers[arm.system]
    return {
        "checkpoint": str(setting.checkpoint.absolute()),
        "folder": str((setting.out / "converted" / f"{peer.converted or arm.system}-{arm.variant}").absolute()),
        "variant": arm.variant,
        "kept": arm.kept,
        "vision_tokens": setting.vision_tokens,
        "threads": setting.threads,
        "max_tokens": setting.max_tokens,
        **question,
    }


class Measurement:
    """Opens arms, lets them take turns, and keeps what each gave, or why it gave nothing."""

    def __init__(self, setting: Setting, bundles: Bundles, question: Mapping[str, Any]) -> None:
        self._setting, self._bundles, self._question = setting, bundles, question
        self._prepared: dict[str, str] = {}
        self.loads: list[dict[str, Any]] = []

    def prepare(self, arms: Sequence[Arm]) -> None:
        """Let peers convert the checkpoint, one after the other, in processes that are gone when it is measured."""
        for arm in arms:
            if arm.system == OURS or not self._setting.peers[arm.system].converted:
                continue
            task = peer_task(arm, self._setting, self._question)
            if task["folder"] in self._prepared:
                continue
            _say(f"preparing {arm.system} {arm.variant}")
            try:
                with self._process(arm) as process:
                    process.request({"do": "prepare", **task})
                self._prepared[task["folder"]] = ""
            except TokexportError as error:
                _say(f"  {error}")
                self._prepared[task["folder"]] = str(error)

    def group(self, arms: Sequence[Arm]) -> list[dict[str, Any]]:
        """Measure arms that take turns."""
        failures: dict[Arm, str] = {}
        opened: dict[Arm, Contestant] = {}
        runs: dict[Arm, list[Mapping[str, Any]]] = {arm: [] for arm in arms}
        footprints: dict[Arm, Mapping[str, Any]] = {}

        def attempt(arm: Arm, do: Callable[[], Any]) -> Any:
            try:
                return do()
            except TokexportError as error:
                _say(f"  {arm.system} {arm.variant}: {error}")
                failures[arm] = str(error)
                return None

        with ExitStack() as stack:
            for arm in arms:
                _say(f"opening {arm.system} {arm.variant}, {arm.method} tokens")
                contestant = attempt(arm, lambda arm=arm: self._open(arm, stack))
                if contestant is not None:
                    opened[arm] = contestant
            before = os.getloadavg()[0]
            for turn in range(_WARMUP + self._setting.repeats):
                _say(f"turn {turn + 1} of {_WARMUP + self._setting.repeats}")
                for arm, contestant in opened.items():
                    run = None if arm in failures else attempt(arm, contestant.measure)
                    if run is not None and turn >= _WARMUP:
                        runs[arm].append(run)
            self.loads.append({"group": list(arms[0].group), "before": before, "after": os.getloadavg()[0]})
            for arm, contestant in opened.items():
                footprints[arm] = {} if arm in failures else attempt(arm, contestant.footprint) or {}
        versions = {arm: getattr(contestant, "version", "") for arm, contestant in opened.items()}
        return [
            {"failed": failures[arm], **_head(arm)}
            if arm in failures
            else {**_head(arm), "version": versions[arm], **row_of(runs[arm]), **footprints[arm]}
            for arm in arms
        ]

    def _open(self, arm: Arm, stack: ExitStack) -> Contestant:
        if arm.system == OURS:
            bundle = next(
                b for (_, width), b in self._bundles.items() if width == arm.bits and _method(b) == arm.method
            )
            return OurProcess(bundle, arm.engine, self._setting, stack)
        task = peer_task(arm, self._setting, self._question)
        reason = self._prepared.get(task["folder"])
        if reason:
            raise TokexportError(reason)
        process = stack.enter_context(self._process(arm))
        process.version = str(process.request({"do": "open", **task}).get("version", ""))
        return process

    def _process(self, arm: Arm) -> PeerProcess:
        setting = self._setting
        return PeerProcess(
            setting.python(arm.system),
            setting.peers[arm.system].script,
            log=setting.out / "logs" / f"{arm.system}-{arm.variant}-{arm.method}.log",
            threads=setting.threads,
            new_tokens=setting.workload.new_tokens,
            limit_s=setting.limit_s,
        )


def _head(arm: Arm) -> dict[str, Any]:
    return {key: value for key, value in asdict(arm).items() if key != "kept"}


def row_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return medians and spreads of runs; None where a system does not tell a part."""
    row: dict[str, Any] = {}
    for key in ("ttft_ms", "vision_ms", "prefill_ms", "decode_ms_per_token"):
        values = [run[key] for run in runs if run.get(key) is not None]
        p10, median, p90 = np.percentile(values, (10, 50, 90)) if values else (0, 0, 0)
        row[key] = {"p10": float(p10), "median": float(median), "p90": float(p90)} if values else None
    return {**row, "tokens_said": list(runs[-1].get("tokens", ()))}


@click.command()
@click.option("--recipe", "names", multiple=True, default=_RECIPES, show_default=True, help="One keeps all tokens.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Changes every recipe.")
@click.option("--peers", "peer_names", default=",".join(PEERS), show_default=True, help="Or NAME:VARIANT, or a script.")
@click.option(
    "--engine",
    "engine_names",
    multiple=True,
    default=(DEFAULT_BACKEND,),
    show_default=True,
    help="Of ours, or ENGINE:BITS.",
)
@click.option("--python", "pythons", multiple=True, metavar="[PEER=]PATH", help="The Python of a peer, or of all.")
@click.option("--bits", multiple=True, type=click.Choice(BITS), default=BITS, show_default=True)
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--threads", type=click.IntRange(min=1), help="By default as many as there are cores.")
@click.option("--text-tokens", default=36, show_default=True, type=click.IntRange(min=8))
@click.option("--new-tokens", default=16, show_default=True, type=click.IntRange(min=1))
@click.option("--limit", "limit_s", default=1800.0, show_default=True, help="Seconds after which a peer is given up.")
@click.option("--one-at-a-time", is_flag=True, help="Nothing takes turns: for models of which memory holds but one.")
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("out/peers"), show_default=True)
def main(
    names: Sequence[str],
    settings: Sequence[str],
    peer_names: str,
    engine_names: Sequence[str],
    pythons: Sequence[str],
    bits: Sequence[Bits],
    repeats: int,
    threads: int | None,
    text_tokens: int,
    new_tokens: int,
    limit_s: float,
    one_at_a_time: bool,
    out: Path,
) -> None:
    """Measure and write peers.json and peers.md."""
    from benchmarks.peers_inputs import write_question
    from benchmarks.random_checkpoint import write_checkpoint
    from tokexport.exporter.export import design

    peers = chosen_peers(peer_names)
    try:
        recipes = chosen_recipes(names, settings)
        engines = chosen_engines(engine_names)
        made = design(recipes[0])
        checkpoint = write_checkpoint(made, out / "checkpoint")
        workload = Workload(text_tokens=text_tokens, new_tokens=new_tokens)
        write_question(made, workload, out)
        spec = made.model.spec
        setting = Setting(
            out=out,
            checkpoint=checkpoint,
            workload=workload,
            threads=threads or available_cores(),
            repeats=repeats,
            peers=peers,
            pythons=named_pythons(pythons),
            limit_s=limit_s,
            vision_tokens=spec.num_vision_tokens,
        )
        bundles = our_artefacts(recipes, setting, bits)
    except TokexportError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{out} cannot be written ({error.strerror or error}); choose another -o") from error
    asked = make_question(spec, workload)
    question = {
        "pixels": str((out / "pixels.npy").absolute()),
        "image": str((out / "image.npy").absolute()),
        "before": list(asked.before),
        "after": list(asked.after),
    }
    (out / "logs").mkdir(exist_ok=True)
    measurement = Measurement(setting, bundles, question)
    arms = all_arms(bundles, peers, engines)
    measurement.prepare(arms)
    document: dict[str, Any] = {
        "rows": [],
        "pairs": [],
        "workload": {**asdict(workload), "repeats": repeats, "vision_tokens": spec.num_vision_tokens, "batch": 1},
        "one_at_a_time": one_at_a_time,
        "recipes": [recipe.name for recipe in recipes],
        "environment": asdict(describe_environment(setting.threads)),
        "loads": measurement.loads,
    }
    groups = [[arm for arm in arms if arm.group == group] for group in dict.fromkeys(arm.group for arm in arms)]
    if one_at_a_time:
        groups = [[arm] for group in groups for arm in group]
    for together in groups:
        document["rows"] += measurement.group(together)
        document["pairs"] = pairs(document["rows"])
        # A run that is ended has at least the groups before.
        write_atomically(out / "peers.json", json.dumps(document, indent=2) + "\n")
        write_atomically(out / "peers.md", table(document))
    click.echo(table(document), nl=False)


def _say(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    main()
