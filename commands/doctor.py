"""``tokexport doctor``: what this machine can do."""

import json
from collections.abc import Mapping

import click

from tokexport.commands.options import output_options
from tokexport.engines.terminal import Terminal


@click.command()
@output_options
def doctor(as_json: bool, quiet: bool) -> None:
    """Say what this machine can build and run, and what is missing for the rest."""
    from tokexport.engines.doctor import examine
    from tokexport.engines.tables import new_table

    report = examine()
    table = new_table("", "", title="environment", show_header=False)
    for name, value in report["environment"].items():
        parts = [f"{k} {v}" for k, v in value.items()] if isinstance(value, Mapping) else value
        table.add_row(name, "; ".join(parts) or "none" if isinstance(parts, list | tuple) else str(parts))
    engines = new_table("engine", "", title="engines")
    for entry in report["engines"]:
        engines.add_row(entry["name"], "ready" if entry["available"] else entry["reason"])
    Terminal(quiet=quiet).show(table, engines)
    if as_json:
        click.echo(json.dumps(report, indent=2))
