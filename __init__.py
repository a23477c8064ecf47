"""tokexport: the compiler for token-compressed vision-language models.

```python
import tokexport

tokexport.build("mini_adsc", "out/mini_adsc")
vlm = tokexport.load("out/mini_adsc")
print(vlm.generate("What is in the picture?", ["scene.png"]).text)
```
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokexport.engines.build import Built
    from tokexport.engines.model import Vlm

__all__ = ["build", "load", "plan"]


def build(
    recipe: str = "mini_adsc",
    out: str | Path | None = None,
    *,
    model: str | None = None,
    weights: str | None = None,
    num_layers: int | None = None,
    adapter: str | None = None,
    dtype: str | None = None,
    settings: Sequence[str] = (),
    **options: Any,
) -> "Built":
    """Export, verify and measure a recipe; see ``tokexport build --help`` and ``engines.build.build``.

    Args:
        recipe: the name of a recipe that ships, or the path of a TOML file.
        out: the artefact's directory, None for ``out/NAME``.
        model: a checkpoint directory or hub id instead of the recipe's.
        weights: ``checkpoint`` or ``random``.
        num_layers: cut a random model to so many decoder layers.
        adapter: a LoRA adapter directory to merge.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        settings: ``key=value`` changes to the recipe.
        options: further arguments of ``engines.build.build``.
    """
    from tokexport.engines.build import build as build_recipe
    from tokexport.recipes.load import load_recipe, override

    loaded = override(
        load_recipe(recipe, settings), model=model, weights=weights, num_layers=num_layers, adapter=adapter, dtype=dtype
    )
    return build_recipe(loaded, Path(out) if out is not None else Path("out") / loaded.name, **options)


def load(path: str | Path, **options: Any) -> "Vlm":
    """Open an artefact to ask it questions; see ``engines.model.load`` for the options."""
    from tokexport.engines.model import load as load_artefact

    return load_artefact(path, **options)


def plan(recipe: str = "mini_adsc", *, settings: Sequence[str] = (), text_tokens: int | None = None) -> dict[str, Any]:
    """Return tokens per layer, FLOPs and KV bytes of a recipe, the keys of ``tokexport plan --json``."""
    from tokexport.exporter.export import planned
    from tokexport.recipes.load import load_recipe

    return planned(load_recipe(recipe, settings), text_tokens=text_tokens)[1]
