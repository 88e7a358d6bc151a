"""`Recipes`: which functions with which weights judge a rollout, by the source of its data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from agent_loop.errors import RewardError
from agent_loop.rewards.reward_function import RewardFunction
from agent_loop.sampling import number

Weights = Mapping[str, float]

Source = str | Callable[[Mapping[str, Any]], Any]
"""The column of a row that names the source of its data, or a function of the row that does."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The weights of the functions that are asked, and of those among them that count in the score."""

    source: str
    weights: Weights
    of_score: Weights

    @classmethod
    def of(cls, source: str, weights: Weights, functions: Mapping[str, RewardFunction]) -> "Recipe":
        """Checked; raises ValueError for names that are none of `functions`, and where no score could come of it."""
        if not isinstance(weights, Mapping):
            raise ValueError(f"the recipe of {source!r} is {weights!r:.80}; it must map names of functions to weights")
        if unknown := [name for name in weights if name not in functions]:
            raise ValueError(f"the recipe of {source!r} has weights for {unknown}; the functions are {sorted(functions)}")
        numbers = {name: number(f"the weight of {name!r} for {source!r}", weight) for name, weight in weights.items()}
        of_score = {name: weight for name, weight in numbers.items() if not functions[name].shaping}
        if not any(of_score.values()):
            raise ValueError(
                f"the recipe of {source!r} is {numbers}: no function that is not shaping has a weight other than 0 to give a score"
            )
        return cls(source, numbers, of_score)


class Recipes:
    """Finds the recipe of a row.

    Args:
        functions: all there are.
        weights: for sources without a recipe of their own; None refuses them where there are recipes, else it is 1 for each.
        recipes: weights by source.
        source: what names the source of a row.
    """

    def __init__(
        self, functions: Mapping[str, RewardFunction], weights: Weights | None, recipes: Mapping[str, Weights] | None, source: Source
    ) -> None:
        if not isinstance(source, str) and not callable(source):
            raise TypeError(f"source={source!r:.80} is neither the name of a column nor a function of a row")
        if recipes is not None and not isinstance(recipes, Mapping):
            raise ValueError(f"recipes={recipes!r:.80} must map sources to weights")
        self._functions, self._source, self._routed = functions, source, recipes is not None
        self._own = {name: Recipe.of(name, own, functions) for name, own in (recipes or {}).items()}
        if weights is None and recipes is None:
            weights = dict.fromkeys(functions, 1.0)
        self._default = None if weights is None else Recipe.of("any source", weights, functions)
        asked = {name for recipe in self.all for name in recipe.weights}
        if idle := sorted(set(functions) - asked):
            raise ValueError(f"functions {idle} have a weight for no source; leave them out, or give them one (0 asks and does not count)")

    @property
    def all(self) -> list[Recipe]:
        """Every recipe."""
        return [*self._own.values(), *([] if self._default is None else [self._default])]

    def find(self, row: Mapping[str, Any]) -> tuple[str, Recipe]:
        """The source of this row, "" where it names none, and the recipe for it.

        Raises:
            RewardError: no recipe is for it, or `source` raised.
        """
        source = self._named(row)
        recipe = self._own.get(source, self._default)
        if recipe is None:
            raise RewardError(
                f"no recipe is for {self._what} {source!r:.80}; those are for {sorted(self._own)}. Add one, or weights= for all others"
            )
        return source, recipe

    @property
    def _what(self) -> str:
        return f"rows with {self._source} =" if isinstance(self._source, str) else "the source"

    def _named(self, row: Mapping[str, Any]) -> str:
        if isinstance(self._source, str):
            named = row.get(self._source)
        else:
            try:
                named = self._source(row)
            except Exception as error:
                raise RewardError(f"source= raised {type(error).__name__}: {error}; it must name the source of any row") from error
        return "" if named is None else str(named)
