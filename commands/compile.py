"""``tokexport compile``: engines from an artefact's graphs."""

import json
from pathlib import Path
from typing import Literal

import click

from tokexport.commands.options import output_options
from tokexport.engines.terminal import Terminal
from tokexport.errors import InputError


@click.command("compile")
@click.argument("artefact", type=click.Path(path_type=Path))
@click.option(
    "--backend",
    default="tensorrt-rtx",
    show_default=True,
    help="Engine that is compiled for: tensorrt-rtx or tensorrt.",
)
@click.option(
    "--capability",
    metavar="X.Y",
    help="Compute capability to build for, e.g. 8.6; by default that of the GPU here, without one 8.9.",
)
@click.option(
    "--attention",
    type=click.Choice(["fused", "plugin"]),
    default="fused",
    show_default=True,
    help="Of the decoder: the library's own kernel, or ours as a plugin (tensorrt only).",
)
@click.option(
    "--max-text-tokens", type=click.IntRange(min=1), help="Room for text in the cache, by default the recipe's."
)
@click.option("--max-images", type=click.IntRange(min=0), help="Room for images in the cache, by default the recipe's.")
@click.option("--overwrite", is_flag=True, help="Replace engines that stand there.")
@output_options
def compile_engines(
    artefact: Path,
    backend: str,
    capability: str | None,
    attention: Literal["fused", "plugin"],
    max_text_tokens: int | None,
    max_images: int | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Build engines with fused attention from an artefact, also for a GPU that is not here."""
    from tokexport.engines.backend import Compiler, SessionOptions, list_backends, load_backend
    from tokexport.engines.tables import engine_table
    from tokexport.exporter.bundle import Bundle

    compiler = load_backend(backend)
    if not isinstance(compiler, Compiler):
        compiled = [name for name in list_backends() if name.startswith("tensorrt")]
        raise InputError(f"backend {backend!r} runs the graphs as they are; compile for one of: {', '.join(compiled)}")
    terminal, bundle = Terminal(quiet=quiet), Bundle.open(artefact)
    options = SessionOptions.for_bundle(bundle, max_text_tokens=max_text_tokens, max_images=max_images)
    with terminal.working():
        path = compiler.compile(
            bundle,
            options,
            capability=capability,
            attention=attention,
            overwrite=overwrite,
            progress=terminal.step,
        )
    record = json.loads((path / "engine.json").read_text(encoding="utf-8"))
    terminal.show(engine_table(record), f"compiled {path}")
    if as_json:
        click.echo(json.dumps({"path": str(path), **record}, indent=2))
