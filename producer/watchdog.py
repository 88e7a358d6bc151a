"""Does anything still move? A pure decision over when groups ended, and what runs since when."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from agent_loop.sampling import number

_MOST_NAMED = 8


@dataclass(frozen=True, slots=True)
class RunningRollout:
    """A rollout in flight.

    Attributes:
        rollout_id: its name.
        since: when it was started, in seconds of the clock that is looked at.
        tokens: that it has so far.
        judged: whether its response is whole, and waits for its reward.
    """

    rollout_id: str
    since: float
    tokens: int
    judged: bool = False

    def standing(self, now: float) -> str:
        """Where it stands, in words."""
        return f"{self.rollout_id} ({self.tokens} tokens{', being judged' if self.judged else ''}, for {now - self.since:.0f} s)"


@dataclass(frozen=True, slots=True)
class Stall:
    """What a watchdog reports: nothing ended for `quiet` seconds, `allowed` are fine, and these rollouts run, the oldest first."""

    quiet: float
    allowed: float
    running: tuple[RunningRollout, ...]
    now: float

    def __str__(self) -> str:
        named = [rollout.standing(self.now) for rollout in self.running[:_MOST_NAMED]]
        more = f" and {len(self.running) - _MOST_NAMED} more" if len(self.running) > _MOST_NAMED else ""
        return (
            f"no group ended for {self.quiet:.0f} s, {self.allowed:.0f} s are allowed; {len(self.running)} rollouts run: "
            f"{', '.join(named)}{more}; look at the engine (health()), at tools and at rewards without a deadline"
        )


@dataclass(frozen=True, slots=True)
class Watchdog:
    """Says when production has stalled: while something runs, no group ended for `factor` times what groups took lately.

    Args:
        factor: of the median of the times that recent groups took.
        least_seconds: a silence that is always allowed, however short groups are.
        first_seconds: the one that is allowed before any group has ended: the first pays for what is loaded and compiled.

    Raises:
        ValueError: a bound is crossed.
    """

    factor: float = 10.0
    least_seconds: float = 60.0
    first_seconds: float = 900.0

    def __post_init__(self) -> None:
        if number("factor", self.factor) < 1:
            raise ValueError(f"factor={self.factor} calls a group of usual length a stall; it must be 1 or more")
        for name in ("least_seconds", "first_seconds"):
            if number(name, getattr(self, name)) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be a number of seconds above 0")

    def allowed(self, took: Sequence[float]) -> float:
        """How many seconds may pass without an end, where recent groups `took` so long."""
        return max(self.least_seconds, self.factor * median(took)) if took else max(self.least_seconds, self.first_seconds)

    def due(self, running: Sequence[RunningRollout], took: Sequence[float], last_end: float | None) -> float | None:
        """The time at which it will have stalled if nothing ends until then: to wait for, rather than to ask again and again.

        None where nothing runs: then nothing can stall.
        """
        return _since(running, last_end) + self.allowed(took) if running else None

    def look(self, running: Sequence[RunningRollout], took: Sequence[float], last_end: float | None, now: float) -> Stall | None:
        """The report, if production has stalled.

        Args:
            running: rollouts in flight.
            took: seconds that recent groups took; some dozens will do.
            last_end: when the last group ended; None before the first.
            now: the time.
        """
        due = self.due(running, took, last_end)
        if due is None or now < due:
            return None
        oldest_first = tuple(sorted(running, key=lambda rollout: (rollout.since, rollout.rollout_id)))
        return Stall(now - _since(running, last_end), self.allowed(took), oldest_first, now)


def _since(running: Sequence[RunningRollout], last_end: float | None) -> float:
    """Since when something could have ended, and did not: an idle time before the first start does not count."""
    first = min(rollout.since for rollout in running)
    return first if last_end is None else max(last_end, first)
