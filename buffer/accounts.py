"""`Account`: what a task sampled and what became of it, over the whole run; what was wasted on the way, and whether short
responses or easy prompts were preferred."""

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection

from buffer import queries
from buffer.amounts import Amount
from buffer.queries import LEFT_OUT, PRUNED
from buffer.status import Status

WINDOW = 8
"""Steps back from which prompts that still wait are overdue, where nothing else is asked for."""

_TRAINED = (Status.CONSUMED, Status.ARCHIVED)
_WASTED = (Status.FILTERED, Status.FAILED, Status.DISCARDED)
_NEVER_TRAINED = (Status.FILTERED, Status.DISCARDED)

WASTE = (*queries.GIVEN_UP, LEFT_OUT, *(status.value for status in _WASTED))
"""Why tokens are wasted: "stale" (expired), "undone" (by a rewind), "interrupted" (without partial rollouts), "restarted" (an
agent loop reset the response), "left_out" (of failed or redundant members of groups that are trained on without them), and those of groups
that are filtered, failed or discarded."""


@dataclass(frozen=True, slots=True)
class Account:
    """What a task sampled, in tokens of responses, those of the environment included: generated = trained + waiting + wasted.

    It covers what was stored, and what was reset before it was stored. What a killed process had decoded since its last
    checkpoint nobody knows.

    Attributes:
        trained: handed out to the trainer, and not given back.
        waiting: in groups that may still be.
        wasted: sampled, and not to be trained on; by reason, every one of `WASTE` present. A failed group that is run again
            waits again.
        finished: every response that was ever whole, those given up since included.
        overdue: prompts that still wait, though one drawn no earlier was trained on `window` steps ago or before.
        cohort: the prompts that were drawn by then: those, what failed of them, and those trained on. Filtered ones left out.
        untrained: of these, not trained on.
        window: steps back that the last three are counted from.
    """

    trained: Amount
    waiting: Amount
    wasted: Mapping[str, int]
    finished: Amount
    overdue: int
    cohort: int
    untrained: int
    window: int

    @property
    def generated(self) -> int:
        """All tokens together."""
        return self.trained.tokens + self.waiting.tokens + sum(self.wasted.values())

    @property
    def length_bias(self) -> float | None:
        """See `length_bias`, over the whole run."""
        return length_bias(self.trained, self.finished)

    @property
    def coverage_bias(self) -> float | None:
        """The fraction of the cohort's prompts that is not trained on; None while there is no cohort.

        It is the total variation distance between the prompts drawn and those trained on: no share of prompts (the slow
        ones, say) differs between the two by more.
        """
        return self.untrained / self.cohort if self.cohort else None


def length_bias(trained: Amount, finished: Amount) -> float | None:
    """The mean length of responses trained on, over that of all responses that were ever whole, minus 1. None without any.

    Below 0, short responses were preferred: -0.1 says that what is trained on is 10 % shorter than what the policy says.
    """
    ours, all_of_them = trained.mean_length, finished.mean_length
    return None if ours is None or not all_of_them else ours / all_of_them - 1


def account(conn: Connection, task_name: str, window: int) -> Account:
    """The task's account, its coverage as of `window` steps before its last one."""
    held, given_up = queries.held(conn, task_name), queries.given_up(conn, task_name)
    consumed = Amount.total([*(held[status] for status in _TRAINED), given_up[PRUNED]])
    trained = Amount(consumed.finished_tokens, consumed.finished, consumed.finished_tokens)
    waiting = Amount.total(amount for status, amount in held.items() if status not in (*_TRAINED, *_WASTED))
    of_groups = {status.value: held[status].tokens for status in _WASTED}
    gone = {why: given_up[why].tokens for why in queries.GIVEN_UP} | {
        LEFT_OUT: given_up[LEFT_OUT].tokens + consumed.tokens - trained.tokens
    }
    wasted = gone | of_groups
    finished = Amount.total([*held.values(), *given_up.values()])
    return Account(trained, waiting, wasted, finished, *_coverage(conn, task_name, window), window)


def _coverage(conn: Connection, task_name: str, window: int) -> tuple[int, int, int]:
    """How many prompts are overdue, in the cohort, and in it untrained."""
    last = queries.drawn_by(conn, task_name, queries.last_step(conn, task_name) - window)
    if last is None:
        return 0, 0, 0
    counts, later = queries.counts(conn, task_name), queries.drawn_after(conn, task_name, last)
    by_then = {status: n - later.get(status, 0) for status, n in counts.items()}
    trained = sum(by_then[status] for status in _TRAINED) + queries.pruned_groups(conn, task_name)
    untrained = sum(n for status, n in by_then.items() if status not in (*_TRAINED, *_NEVER_TRAINED))
    return untrained - by_then[Status.FAILED], trained + untrained, untrained
