"""``tokexport plan``: what a recipe makes, before it is made."""

import json
from pathlib import Path
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
@click.option(
    "--machine",
    metavar="here|GFLOPS,GBPS",
    help="Say the least time: 'here' measures this machine; figures of another one are what 'tokexport doctor' prints "
    "there, e.g. 180,20.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of --machine here, by default one per core.")
@output_options
def plan(
    text_tokens: int | None,
    solve: str | None,
    machine: str | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
    **recipe: Any,
) -> None:
    """Say what a recipe makes and what that costs, without reading weights.

    Vision tokens of each layer, FLOPs, KV cache, bytes on disk and in memory; with --machine the least time.
    """
    if threads is not None and machine != "here":
        raise click.UsageError("--threads says how many threads are measured; give it with --machine here")
    from tokexport.engines.cost_tables import size_tables
    from tokexport.engines.fit import fit_here, fit_warnings
    from tokexport.engines.machine import planning_machine
    from tokexport.engines.tables import plan_tables, proposals_table
    from tokexport.exporter.export import planned
    from tokexport.exporter.solve import Budget, propose
    from tokexport.exporter.time_bound import time_bounds

    budget = Budget.parse(solve) if solve else None
    made, report = planned(recipe_from(**recipe), text_tokens=text_tokens)
    if machine is not None:
        report = {**report, "time_bound": time_bounds(report, planning_machine(machine, made, report, threads))}
    terminal = Terminal(quiet=quiet)
    terminal.show(*plan_tables(report, made.plan), *size_tables(report))
    if machine in (None, "here"):
        report = {**report, "fits_here": fit_here(report, Path("out"))}
        terminal.show(*fit_warnings(report["fits_here"]))
    if budget is not None:
        proposals = [
            proposal.table()
            for proposal in propose(made.model.spec, budget, text_tokens=report["prompt_tokens"]["text"])
        ]
        report = {**report, "proposals": proposals}
        terminal.show(proposals_table(proposals))
    if as_json:
        click.echo(json.dumps(report, indent=2))
