"""What ``benchmarks/peers.py`` is asked to compare: peers, our engines, and recipes.

The processes of our engines import it, so it loads no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import click

from tokexport.engines.backend import load_backend
from tokexport.recipes.load import load_recipe
from tokexport.recipes.schema import Recipe

Bits = Literal["float", "int8", "int4"]
BITS: tuple[Bits, ...] = ("float", "int8", "int4")
_SCRIPTS = Path(__file__).with_name("peers")


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Something to compare with.

    Attributes:
        script: run in its own Python.
        variants: precisions as the peer calls them, and which bits of ours they stand beside.
        converted: name under which what it made of the checkpoint is kept, empty where it reads that as it is; peers
            may share it.
        prunes: it computes with fewer image tokens, in each of these variants.
    """

    script: Path
    variants: Mapping[str, Bits]
    converted: str = ""
    prunes: Sequence[str] = ()


_OPENVINO: Mapping[str, Bits] = {"fp16": "float", "int8": "int8", "int4": "int4"}
_LLAMA_CPP: Mapping[str, Bits] = {"f16": "float", "q8_0": "int8", "q4_0": "int4"}
PEERS: Mapping[str, Peer] = {
    "transformers": Peer(
        script=_SCRIPTS / "peer_transformers.py",
        variants={"fp32": "float", "bf16": "float", "fp32-compiled": "float", "bf16-compiled": "float"},
    ),
    "openvino": Peer(
        script=_SCRIPTS / "peer_openvino.py", variants=_OPENVINO, converted="openvino", prunes=tuple(_OPENVINO)
    ),
    # Of its own pruning, one precision is enough to see whether it has an effect.
    "openvino-genai": Peer(
        script=_SCRIPTS / "peer_openvino_genai.py", variants=_OPENVINO, converted="openvino", prunes=("int8",)
    ),
    "llama-cpp": Peer(script=_SCRIPTS / "peer_llama_cpp.py", variants=_LLAMA_CPP, converted="gguf"),
}


def chosen_peers(names: str) -> dict[str, Peer]:
    """Return peers by their names, with ``:VARIANT`` for one precision, or by the path of a script that answers alike.

    Raises:
        ClickException: there is no such peer or precision.
    """
    chosen: dict[str, Peer] = {}
    for entry in filter(None, names.split(",")):
        name, _, variant = entry.partition(":")
        if name.endswith(".py"):
            chosen[Path(name).stem] = Peer(script=Path(name), variants={"default": "float"})
            continue
        if name not in PEERS:
            raise click.ClickException(
                f"there is no peer {name!r}; choose from {', '.join(PEERS)}, or give the path of a script"
            )
        variants = PEERS[name].variants
        if variant and variant not in variants:
            raise click.ClickException(f"{name} has no {variant!r}; choose from {', '.join(variants)}")
        taken = chosen[name].variants if name in chosen else {}
        chosen[name] = replace(PEERS[name], variants={**taken, variant: variants[variant]} if variant else variants)
    return chosen


def chosen_engines(entries: Sequence[str]) -> dict[str, Sequence[Bits]]:
    """Return which bits each of our engines runs, ``ENGINE:BITS`` for one and ``ENGINE`` for all.

    Raises:
        ClickException: there are no such bits.
        BackendUnavailableError: there is no such engine, or a package it needs is missing.
    """
    chosen: dict[str, Sequence[Bits]] = {}
    for entry in entries:
        name, _, width = entry.partition(":")
        if width and width not in BITS:
            raise click.ClickException(f"an artefact has no {width!r}; choose from {', '.join(BITS)}")
        load_backend(name)
        mine: tuple[Bits, ...] = tuple(bits for bits in BITS if width in ("", bits))
        chosen[name] = (*chosen.get(name, ()), *mine)
    return chosen


def named_pythons(entries: Sequence[str]) -> dict[str, str]:
    """Return interpreters by the peers that they are for; one without a name is for all others."""
    parts = [entry.rpartition("=") for entry in entries]
    return {name: path for name, _, path in parts}


def chosen_recipes(names: Sequence[str], settings: Sequence[str]) -> list[Recipe]:
    """Return recipes, the one with all tokens first.

    Raises:
        ClickException: not exactly one keeps all tokens.
    """
    recipes = [load_recipe(name, settings) for name in names]
    if sum(not recipe.compress for recipe in recipes) != 1:
        raise click.ClickException(
            f"of the recipes {', '.join(names)} exactly one must keep all tokens, e.g. bench_full"
        )
    return sorted(recipes, key=lambda recipe: bool(recipe.compress))
