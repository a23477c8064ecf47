"""From an artefact back to the checkpoint it was made from."""

from dataclasses import replace

from tokexport.errors import CheckpointError
from tokexport.exporter.bundle import Bundle
from tokexport.exporter.checkpoint import fingerprint
from tokexport.exporter.export import Design, design


def source_design(bundle: Bundle, model: str | None) -> Design:
    """Return the design an artefact was made from, its checkpoint at hand.

    Args:
        bundle: the artefact.
        model: where its checkpoint lies now, None for where it lay.

    Raises:
        CheckpointError: the checkpoint is gone or another one.
    """
    recipe = bundle.recipe
    if model is not None:
        recipe = replace(recipe, model=replace(recipe.model, checkpoint=model))
    made = design(recipe)
    if fingerprint(made.model) != bundle.manifest.model.fingerprint:
        raise CheckpointError(
            f"{recipe.model.checkpoint} is not the checkpoint that {bundle.path} was made from; give the "
            "right one with --model"
        )
    return made
