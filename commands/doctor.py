"""``tokexport doctor``: what this machine can do."""

import json
from collections.abc import Mapping
from typing import Any

import click

from tokexport.commands.options import output_options
from tokexport.engines.terminal import Terminal


@click.command()
@click.option(
    "--precision",
    type=click.Choice(["float32", "float16", "int8", "int4"]),
    default="float32",
    show_default=True,
    help="Of the matrix products that are measured.",
)
@output_options
def doctor(precision: str, as_json: bool, quiet: bool) -> None:
    """Say what this machine can build and run, how fast it computes, and what is missing for the rest."""
    from tokexport.engines.cost_text import machine_text
    from tokexport.engines.doctor import examine
    from tokexport.engines.tables import new_table

    report = examine(precision)
    table = new_table("", "", title="environment", show_header=False)
    for name, value in report["environment"].items():
        parts = [f"{k} {v}" for k, v in value.items()] if isinstance(value, Mapping) else value
        table.add_row(name, "; ".join(parts) or "none" if isinstance(parts, list | tuple) else str(parts))
    machine = report["machine"]
    table.add_row(
        "measured", machine.get("reason") or f"{machine_text(machine)}; for: plan --machine {_figures(machine)}"
    )
    engines = new_table("engine", "", title="engines")
    for entry in report["engines"]:
        engines.add_row(entry["name"], "ready" if entry["available"] else entry["reason"])
    Terminal(quiet=quiet).show(table, engines)
    if as_json:
        click.echo(json.dumps(report, indent=2))


def _figures(machine: Mapping[str, Any]) -> str:
    return f"{machine['gflops_per_s']:.0f},{machine['gb_per_s']:.1f}"
