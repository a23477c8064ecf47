"""Methods that choose vision tokens by what the vision tower's class token attends to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tokexport.errors import RecipeError
from tokexport.exporter.method import Method
from tokexport.exporter.plan import TokenPlan, VlmSpec, resolve_keep


@dataclass(frozen=True, kw_only=True)
class ByClassToken(Method):
    """A method that reads attention and keys in a layer of the tower.

    Attributes:
        keep: a token count (int) or a fraction (float).
        tower_layer: counted from 0, by default the one whose output is taken, the penultimate of LLaVA-1.5's tower. In
            it nothing reads what the class token attends to, so a tower that was trained for LLaVA alone never learned
            it there; the layer before then chooses better.
    """

    chooser: ClassVar[str] = "top"
    is_merging: ClassVar[bool] = True

    keep: int | float
    tower_layer: int | None = None

    def plan(self, spec: VlmSpec, arriving: TokenPlan) -> TokenPlan:
        self.layer_read(spec)
        if arriving.entering_llm != arriving.emitted:
            raise RecipeError(
                f"[[compress]] {self.name} chooses among the {arriving.emitted} vision tokens that the tower emits, of "
                f"which an earlier method left {arriving.entering_llm}; put {self.name} first"
            )
        return arriving.thinned_before_llm(resolve_keep(self.keep, arriving.emitted, f"[[compress]] {self.name}:"))

    @classmethod
    def choices(cls, spec: VlmSpec) -> Mapping[str, Sequence[Any]]:
        layer_before = (spec.class_token_layers or 0) - 2
        return {**super().choices(spec), "tower_layer": (None, layer_before) if layer_before >= 0 else (None,)}

    def layer_read(self, spec: VlmSpec) -> int:
        """Return the number of the tower layer whose attention counts.

        Raises:
            RecipeError: there is none with a class token, or not this one.
        """
        if spec.class_token_layers is None:
            raise RecipeError(
                f"[[compress]] {self.name} chooses by the attention of a class token, which the vision tower of this "
                f'model of family {spec.family} does not have; choose a method without, e.g. "divprune"'
            )
        if self.tower_layer is None:
            return spec.class_token_layers - 1
        return self.require_layer(spec, "tower_layer", self.tower_layer)

    def require_layer(self, spec: VlmSpec, option: str, layer: int) -> int:
        """Return ``layer``.

        Raises:
            RecipeError: it is not a layer of the tower up to the one whose output is taken.
        """
        assert spec.class_token_layers is not None
        if not 0 <= layer < spec.class_token_layers:
            raise RecipeError(
                f"[[compress]] {self.name} {option} = {layer} is not a layer of the vision tower whose attention the "
                f"image features come from; choose 0 to {spec.class_token_layers - 1}"
            )
        return layer
