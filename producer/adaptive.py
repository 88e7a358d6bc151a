"""`AdaptiveLimit`: as many rollouts in flight as keep the engine busy, and few that wait in its queue. Pure: state in, state out."""

from dataclasses import dataclass, replace

from agent_loop.engines.base import EngineLoad
from agent_loop.sampling import number, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveLimit:
    """A cap on rollouts in flight that follows the engine: additive increase, multiplicative decrease.

    `after` gives the state after a look at the engine. It rises by `increase` while the engine keeps up and the cap is what
    holds back; it falls by the factor `decrease` when requests queue or were preempted, and not again before what is in
    flight has come down to it: only then does the engine show what the fall did.

    Args:
        smallest: it never falls below.
        largest: it never rises above.
        start: where it begins; None begins at `smallest`.
        increase: rollouts added at a time.
        decrease: factor of a fall.
        queue: requests that may wait for each one that runs, one in any case: a short queue fills a slot at once.

    Raises:
        ValueError: a bound is crossed.
    """

    smallest: int = 8
    largest: int = 4096
    start: int | None = None
    increase: float = 4.0
    decrease: float = 0.8
    queue: float = 0.05
    _exact: float | None = None
    _preemptions: int | None = None

    def __post_init__(self) -> None:
        if whole("smallest", self.smallest) < 1:
            raise ValueError(f"smallest={self.smallest} lets nothing run; it must be 1 or more")
        if whole("largest", self.largest) < self.smallest:
            raise ValueError(f"largest={self.largest} lies below smallest={self.smallest}; swap them")
        if self.start is not None and not self.smallest <= whole("start", self.start) <= self.largest:
            raise ValueError(f"start={self.start} does not lie between smallest={self.smallest} and largest={self.largest}")
        if number("increase", self.increase) <= 0:
            raise ValueError(f"increase={self.increase} must be above 0; it is the rollouts added at a time")
        if not 0 < number("decrease", self.decrease) < 1:
            raise ValueError(f"decrease={self.decrease} must lie between 0 and 1; the limit is multiplied by it")
        if number("queue", self.queue) < 0:
            raise ValueError(f"queue={self.queue} is negative; 0 lets no request wait")

    @property
    def limit(self) -> int:
        """The most rollouts in flight now."""
        return int(self._now)

    @property
    def _now(self) -> float:
        if self._exact is not None:
            return self._exact
        return float(self.smallest if self.start is None else self.start)

    def after(self, load: EngineLoad | None, in_flight: int) -> "AdaptiveLimit":
        """The state after a look at the engine, with so many rollouts in flight. Look before more are started: those just wait.

        An engine that says nothing, or runs nothing of what waits (it is paused, say), changes nothing.
        """
        if load is None or (load.running == 0 and load.waiting > 0):
            return self
        preempted = self._preemptions is not None and load.preemptions > self._preemptions
        seen = replace(self, _preemptions=load.preemptions)
        if preempted or load.waiting > max(1.0, self.queue * load.running):
            return seen if in_flight > self.limit else seen._at(self._now * self.decrease)
        return seen._at(self._now + self.increase) if in_flight >= self.limit else seen

    def _at(self, limit: float) -> "AdaptiveLimit":
        return replace(self, _exact=min(max(limit, float(self.smallest)), float(self.largest)))
