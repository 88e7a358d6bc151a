"""`RewardSet`: several reward functions as one, with weights by source of data, limits and failures of their own."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

from agent_loop.errors import RewardError
from agent_loop.rewards.combining import combined
from agent_loop.rewards.judgement import Judgement
from agent_loop.rewards.recipes import Recipe, Recipes, Source, Weights
from agent_loop.rewards.reward_function import Asker, RewardFunction
from agent_loop.rewards.statistics import RewardStatistics
from buffer.rollout import RolloutGroup, RolloutState


class RewardSet:
    """Named reward functions that judge together; give it to an agent loop as `reward`.

    Each rollout is judged by the recipe for its source: the functions run at once, and the sum of weight times part is its
    `reward`. Its `score` is the sum without the functions that are `shaping`. What each function gave goes into the
    rollout's `reward_parts` as it comes: a part that is there is not asked for again, after a failure of another function, an
    interruption, or a crash. A set with functions `of_group` judges a group when all its rollouts are whole; its other functions
    are asked of each rollout as soon as that is.

    As an async context manager it opens and closes what its functions need (a server's connections, a model, processes);
    plain functions need no opening.

    Args:
        functions: by name; a plain function has the limits that are `RewardFunction`'s defaults.
        weights: of the functions, for rows of a source without a recipe of its own. Without `recipes` the default is 1 for each;
            with them, rows of other sources fail.
        recipes: weights by source.
        source: the column of the row that names its source, or a function of the row that does: a predicate, a prefix.

    Raises:
        ValueError: a weight is for no function, a function is for no source, or no score can come of a recipe.
    """

    own_deadlines = True
    """Each function has its own; `reward_timeout` is of plain rewards."""

    def __init__(
        self,
        functions: Mapping[str, RewardFunction | Callable[[Any], Any]],
        weights: Weights | None = None,
        *,
        recipes: Mapping[str, Weights] | None = None,
        source: Source = "data_source",
    ) -> None:
        if not isinstance(functions, Mapping) or not functions:
            raise ValueError(f"functions={functions!r:.80} must map one name or more to reward functions")
        if bad := [name for name in functions if not isinstance(name, str) or not name]:
            raise ValueError(f"functions are called {bad}; their names must be text")
        self.functions = {name: one if isinstance(one, RewardFunction) else RewardFunction(one) for name, one in functions.items()}
        self._recipes = Recipes(self.functions, weights, recipes, source)
        self._askers = {name: Asker(name, function) for name, function in self.functions.items()}
        self._statistics: dict[tuple[str, str], RewardStatistics] = {}
        self._opened = AsyncExitStack()

    @property
    def of_group(self) -> bool:
        """Whether a function judges whole groups."""
        return any(function.of_group for function in self.functions.values())

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as opening:
            for reward in {id(one.function): one.function for one in self.functions.values()}.values():
                if hasattr(reward, "__aenter__"):
                    await opening.enter_async_context(reward)  # type: ignore[arg-type]
            self._opened = opening.pop_all()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._opened.__aexit__(kind, error, trace)

    async def __call__(self, subject: RolloutState | RolloutGroup) -> Any:
        """The judgement of a rollout, or those of the rollouts of a group, in order.

        Raises:
            RewardError: a function failed for good, there is no recipe for the row, or no function had a say.
        """
        if isinstance(subject, RolloutGroup):
            return await self._judged(subject.rollouts, subject)
        if self.of_group:
            raise RewardError("functions of whole groups cannot judge one rollout; give the set to the agent loop, which asks with groups")
        (judgement,) = await self._judged([subject], None)
        return judgement

    @property
    def statistics(self) -> dict[tuple[str, str], RewardStatistics]:
        """By function and source, since the set was made or `reset_statistics` was called."""
        return dict(self._statistics)

    def reset_statistics(self) -> None:
        """Count from 0 on, as for the next batch."""
        self._statistics.clear()

    def metrics(self) -> dict[str, float]:
        """The statistics as numbers: `rewards/<function>/<what>`, and `rewards/<function>/<source>/<what>` where sources are named."""
        totals: dict[str, RewardStatistics] = {}
        for (name, _), own in self._statistics.items():
            totals[name] = totals.get(name, RewardStatistics()) + own
        labelled = list(totals.items())
        labelled += [(f"{name}/{source}", own) for (name, source), own in self._statistics.items() if source]
        return {f"rewards/{label}/{what}": value for label, own in labelled for what, value in own.metrics().items()}

    async def begin(self, state: RolloutState) -> None:
        """Ask the functions of single rollouts about a member of a group whose siblings are not whole yet.

        Raises:
            RewardError: one failed for good, or there is no recipe for the row.
        """
        source, recipe = self._recipes.find(state.row)
        await self._run([self._asking(name, source, state, [state]) for name in recipe.weights if self._lacks(name, state)])

    async def _judged(self, states: Sequence[RolloutState], group: RolloutGroup | None) -> list[Judgement]:
        source, recipe = self._recipes.find(states[0].row)  # one prompt's rollouts have one row
        asking = [self._asking(name, source, state, [state]) for name in recipe.weights for state in states if self._lacks(name, state)]
        for name in recipe.weights:
            # One that was sampled anew changes what its siblings are worth.
            if self.functions[name].of_group and not all(_has_answered(name, state) for state in states):
                asking.append(self._asking(name, source, group, list(states)))
        await self._run(asking)
        return [_weighed(recipe, state) for state in states]

    def _lacks(self, name: str, state: RolloutState) -> bool:
        """Whether a function of single rollouts has not judged this one."""
        return not self.functions[name].of_group and not _has_answered(name, state)

    def _asking(self, name: str, source: str, subject: Any, states: list[RolloutState]) -> "_Asking":
        statistics = self._statistics.setdefault((name, source), RewardStatistics())
        return _Asking(self._askers[name], statistics, subject, states)

    async def _run(self, asking: Sequence["_Asking"]) -> None:
        """All run to their ends though one failed: what the others gave is not asked for again."""
        if len(asking) == 1:
            await asking[0].run()
        elif asking:
            async with asyncio.TaskGroup() as tasks:
                for one in asking:
                    tasks.create_task(one.run())
        if failed := [one.error for one in asking if one.error is not None]:
            raise RewardError("; ".join(dict.fromkeys(map(str, failed)))) from failed[0]


class _Asking:
    """One function asked of one rollout or group: writes what it says into the rollouts, and keeps how it failed."""

    def __init__(self, asker: Asker, statistics: RewardStatistics, subject: Any, states: list[RolloutState]) -> None:
        self._asker, self._subject, self._states, self._statistics = asker, subject, states, statistics
        self.error: RewardError | None = None

    async def run(self) -> None:
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            judgements = await self._asker.ask(self._subject, len(self._states), self._statistics)
        except RewardError as error:
            self._failed(error)
        else:
            self._write(judgements)
        for state in self._states:
            state.metrics[f"reward_seconds/{self._asker.name}"] = clock() - began

    def _write(self, judgements: Sequence[Judgement | None]) -> None:
        name = self._asker.name
        for state, judgement in zip(self._states, judgements, strict=True):
            _forget(name, state)
            if judgement is None:
                state.metrics[f"reward_no_say/{name}"] = 1.0
                self._statistics.no_say += 1
            else:
                state.reward_parts[name] = judgement.score
                state.metrics.update(judgement.metrics)
                self._statistics.gave(judgement.score)

    def _failed(self, error: RewardError) -> None:
        name, function = self._asker.name, self._asker.function
        if function.on_error == "fail":
            self.error = error
            return
        for state in self._states:
            _forget(name, state)
            if function.stand_in is None:
                state.metrics[f"reward_skipped/{name}"] = 1.0
                self._statistics.skipped += 1
            else:
                state.reward_parts[name], state.metrics[f"reward_filled/{name}"] = function.stand_in, 1.0
                self._statistics.filled += 1


def _has_answered(name: str, state: RolloutState) -> bool:
    return name in state.reward_parts or f"reward_no_say/{name}" in state.metrics or f"reward_skipped/{name}" in state.metrics


def _forget(name: str, state: RolloutState) -> None:
    """What an earlier judgement by this function left."""
    state.reward_parts.pop(name, None)
    for mark in ("no_say", "skipped", "filled"):
        state.metrics.pop(f"reward_{mark}/{name}", None)


def _weighed(recipe: Recipe, state: RolloutState) -> Judgement:
    skipped = [name for name in recipe.weights if f"reward_skipped/{name}" in state.metrics]
    reward = combined(recipe.weights, state.reward_parts, skipped)
    score = reward if recipe.of_score == recipe.weights else combined(recipe.of_score, state.reward_parts, skipped)
    return Judgement(score, reward)
