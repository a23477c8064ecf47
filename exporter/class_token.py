"""Methods that choose vision tokens by what the vision tower's class token attends to."""

from dataclasses import dataclass

from tokexport.errors import RecipeError
from tokexport.exporter.method import Method
from tokexport.exporter.plan import TokenPlan, VlmSpec, resolve_keep


@dataclass(frozen=True, kw_only=True)
class ByClassToken(Method):
    """A method that reads attention and keys of the tower layer whose output is taken, the penultimate of LLaVA-1.5's.

    Attributes:
        keep: a token count (int) or a fraction (float).
    """

    keep: int | float

    def plan(self, spec: VlmSpec, arriving: TokenPlan) -> TokenPlan:
        self.last_layer(spec)
        if arriving.entering_llm != arriving.emitted:
            raise RecipeError(
                f"[[compress]] {self.name} chooses among the {arriving.emitted} vision tokens that the tower emits, of "
                f"which an earlier method left {arriving.entering_llm}; put {self.name} first"
            )
        return arriving.thinned_before_llm(resolve_keep(self.keep, arriving.emitted, f"[[compress]] {self.name}:"))

    def last_layer(self, spec: VlmSpec) -> int:
        """Return the number of the tower layer whose output is taken.

        Raises:
            RecipeError: there is none with a class token.
        """
        if spec.class_token_layers is None:
            raise RecipeError(
                f"[[compress]] {self.name} chooses by the attention of a class token, which the vision tower of this "
                f'model of family {spec.family} does not have; choose a method without, e.g. "divprune"'
            )
        return spec.class_token_layers - 1
