"""From an artefact back to the checkpoint it was made from."""

from dataclasses import replace

from tokexport.errors import CheckpointError, InputError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.export import Design, design


def source_design(bundle: Bundle, model: str | None = None, adapter: str | None = None) -> Design:
    """Return the design an artefact was made from, its checkpoint and adapter at hand.

    Args:
        bundle: the artefact.
        model: where its checkpoint lies now, None for where it lay.
        adapter: where its adapter lies now, None for where it lay.

    Raises:
        CheckpointError: the checkpoint or the adapter is gone or another one.
        InputError: an adapter for an artefact that was made without one.
    """
    recipe = bundle.recipe
    if adapter is not None and recipe.model.adapter is None:
        raise InputError(f"{bundle.path} was made without an adapter; leave out --adapter")
    moved = {"checkpoint": model, "adapter": adapter}
    table = replace(recipe.model, **{key: value for key, value in moved.items() if value is not None})
    made = design(replace(recipe, model=table))
    if made.fingerprint() == bundle.manifest.model.fingerprint:
        return made
    if table.adapter is None:
        raise CheckpointError(
            f"{table.checkpoint} is not the checkpoint that {bundle.path} was made from; give the right one with "
            "--model"
        )
    raise CheckpointError(
        f"{table.checkpoint} with the adapter {table.adapter} is not what {bundle.path} was made from; give the right "
        "ones with --model and --adapter"
    )
