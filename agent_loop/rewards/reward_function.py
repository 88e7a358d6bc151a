"""`RewardFunction`: one function of a `RewardSet`, with its limits and what becomes of its failures."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from agent_loop.arguments import at_least, flag, positive, within
from agent_loop.errors import RewardError, RewardTimeoutError
from agent_loop.rewards.judgement import Judgement, answers_of, judgement_of
from agent_loop.rewards.judging import answer
from agent_loop.rewards.statistics import RewardStatistics
from agent_loop.sampling import number

_CONCURRENCY = 32
"""Calls of one function at once, unless it is told otherwise."""

_LONGEST_BACK_OFF = 30.0
"""Seconds to which the pause before a retry is doubled at most."""


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A reward function and how it is asked.

    Attributes:
        function: of a rollout, or of a group; sync or async. It may give None: it has no say on this rollout. Of a `Judgement` the
            score is the part, and the metrics are kept.
        of_group: it judges whole groups, and gives a number or None for each of the rollouts.
        shaping: it counts in `reward`, which trains, and not in `score`, which filters see.
        timeout: seconds for one call.
        concurrency: calls at once; more wait, and their time does not run meanwhile. None is 32, or as many as a reward that asks
            elsewhere works on at once.
        on_error: "fail" fails the rollout with the reason; "skip" goes on without this part, its weight shared out among the
            others; a number is taken in its place.
        retries: how often a call that failed is repeated before that.
        back_off: seconds before the first repetition, doubled for each further one, up to 30.

    Raises:
        ValueError: a bound is crossed.
        TypeError: `function` is none.
    """

    function: Callable[[Any], Any]
    of_group: bool = False
    shaping: bool = False
    timeout: float = 60.0
    concurrency: int | None = None
    on_error: Literal["fail", "skip"] | float = "fail"
    retries: int = 0
    back_off: float = 0.5

    def __post_init__(self) -> None:
        if not callable(self.function) or isinstance(self.function, type):
            raise TypeError(f"function={self.function!r:.80} is no function of a rollout or a group")
        flag("of_group", self.of_group)
        flag("shaping", self.shaping)
        positive("timeout", self.timeout)
        if self.concurrency is not None:
            at_least("concurrency", self.concurrency, 1)
        at_least("retries", self.retries, 0)
        within("back_off", self.back_off, 0, float("inf"))
        if not isinstance(self.on_error, str):
            number("on_error", self.on_error)
        elif self.on_error not in ("fail", "skip"):
            raise ValueError(f'on_error={self.on_error!r} is unknown; it is "fail", "skip", or the number to take')

    @property
    def slots(self) -> int:
        """Calls at once: beyond what is worked on, they would wait while their time runs."""
        own: int | None = getattr(self.function, "at_once", None)
        if own is None:
            return _CONCURRENCY if self.concurrency is None else self.concurrency
        return own if self.concurrency is None else min(own, self.concurrency)

    @property
    def stand_in(self) -> float | None:
        """The number taken where it fails; None if there is none."""
        return None if isinstance(self.on_error, str) else float(self.on_error)


class Asker:
    """Asks one function of a set, within its limits."""

    def __init__(self, name: str, function: RewardFunction) -> None:
        self.name, self.function = name, function
        self._loop: asyncio.AbstractEventLoop | None = None

    async def ask(self, subject: Any, n: int, statistics: RewardStatistics) -> list[Judgement | None]:
        """One judgement, or None where it has no say, for each of the `n` rollouts of `subject`, repeated as it is told.

        Raises:
            RewardError: the last call failed too; see `__cause__`.
        """
        for repetition in range(1 + self.function.retries):
            if repetition:
                statistics.retries += 1
                await asyncio.sleep(min(self.function.back_off * 2.0 ** min(repetition - 1, 60), _LONGEST_BACK_OFF))
            try:
                return await self._once(subject, n, statistics)
            except RewardError as error:
                statistics.failures += 1
                statistics.timeouts += isinstance(error, RewardTimeoutError)
                last = error
        raise last

    async def _once(self, subject: Any, n: int, statistics: RewardStatistics) -> list[Judgement | None]:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # a set is of no event loop: scripts and notebooks run several, one after the other
            self._loop, self._slots = loop, asyncio.Semaphore(self.function.slots)
        async with self._slots:
            began = loop.time()
            try:
                given = await answer(self.function.function, subject, self.function.timeout, self.name, "its timeout")
            finally:
                statistics.called(loop.time() - began)
        answers: Sequence[Any] = answers_of(given, n, self.name) if self.function.of_group else [given]
        return [None if one is None else judgement_of(one, self.name) for one in answers]
