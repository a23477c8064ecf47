"""From an artefact back to the checkpoint it was made from."""

from dataclasses import replace

from tokexport.engines.backend import Source
from tokexport.errors import CheckpointError, InputError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.export import Design, design
from tokexport.recipes.load import with_compressor
from tokexport.recipes.schema import Recipe


def source_design(bundle: Bundle, source: Source) -> Design:
    """Return the design an artefact was made from, its checkpoint and all else at hand.

    Raises:
        CheckpointError: the checkpoint, the adapter or the compressor is gone or another one.
        InputError: an adapter or a compressor for an artefact that was made without one.
    """
    recipe = bundle.recipe
    for name, given, is_used in (
        ("adapter", source.adapter, recipe.model.adapter is not None),
        ("compressor", source.compressor, _has_learned(recipe)),
    ):
        if given is not None and not is_used:
            raise InputError(f"{bundle.path} was made without {_with_article(name)}; leave out --{name}")
    moved = {"checkpoint": source.model, "adapter": source.adapter}
    table = replace(recipe.model, **{key: value for key, value in moved.items() if value is not None})
    recipe = replace(recipe, model=table)
    made = design(recipe if source.compressor is None else with_compressor(recipe, source.compressor))
    if made.fingerprint() == bundle.manifest.model.fingerprint:
        return made
    parts = [] if table.adapter is None else [f"the adapter {table.adapter}"]
    parts += [f"the compressor {step.options['weights']}" for step in made.recipe.compress if "weights" in step.options]
    if not parts:
        raise CheckpointError(
            f"{table.checkpoint} is not the checkpoint that {bundle.path} was made from; give the right one with "
            "--model"
        )
    options = ["--model", *(f"--{part.split()[1]}" for part in parts)]
    raise CheckpointError(
        f"{table.checkpoint} with {' and '.join(parts)} is not what {bundle.path} was made from; give the right ones "
        f"with {', '.join(options[:-1])} and {options[-1]}"
    )


def base_fingerprint(bundle: Bundle) -> str:
    """Return the fingerprint of the checkpoint alone that an artefact was made from.

    Raises:
        CheckpointError: the artefact does not know it, and its checkpoint is gone.
    """
    record, recipe = bundle.manifest.model, bundle.recipe
    if record.base_fingerprint:
        return record.base_fingerprint
    if recipe.model.adapter is None and not _has_learned(recipe):
        return record.fingerprint
    return design(replace(recipe, model=replace(recipe.model, adapter=None), compress=())).fingerprint()


def _has_learned(recipe: Recipe) -> bool:
    return any("weights" in step.options for step in recipe.compress)


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
