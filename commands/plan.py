"""``tokexport plan``: what a recipe makes, before it is made."""

import json
from typing import Any

import click

from tokexport.commands.options import output_options, recipe_from, recipe_options
from tokexport.engines.terminal import Terminal


@click.command()
@recipe_options
@click.option("--text-tokens", type=click.IntRange(min=0), help="Text tokens of the prompt, by default the recipe's.")
@click.option(
    "--solve",
    metavar="KIND=PART",
    help="Propose drop schedules that keep this part of the vision KV cache (kv=0.433) or of the FLOPs (flops=0.46).",
)
@output_options
def plan(text_tokens: int | None, solve: str | None, as_json: bool, quiet: bool, **recipe: Any) -> None:
    """Say how many tokens reach each layer and what that costs, without reading weights."""
    from tokexport.engines.tables import plan_tables, proposals_table
    from tokexport.exporter.export import planned
    from tokexport.exporter.solve import Budget, propose

    budget = Budget.parse(solve) if solve else None
    made, report = planned(recipe_from(**recipe), text_tokens=text_tokens)
    terminal = Terminal(quiet=quiet)
    terminal.show(*plan_tables(report, made.plan))
    if budget is not None:
        proposals = [
            proposal.table()
            for proposal in propose(made.model.spec, budget, text_tokens=report["prompt_tokens"]["text"])
        ]
        report = {**report, "proposals": proposals}
        terminal.show(proposals_table(proposals))
    if as_json:
        click.echo(json.dumps(report, indent=2))
