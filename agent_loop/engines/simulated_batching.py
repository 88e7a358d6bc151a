"""Continuous batching as a model: who runs when, and how far each has come. It knows no event loop and no tokens, only their number.

All requests that decode have one rate, so one counter, `_progress`, tells how far each has come since it began: it counts the tokens of
a request that decodes all the time. A request is due when the counter reaches a number, and a heap of these numbers gives the next one,
whatever becomes of the rate meanwhile. A token is divided into `_TOKEN` parts, whole numbers: sums are exact.
"""

import heapq
import math
from collections import OrderedDict
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from agent_loop.engines.simulated_costs import CostModel, PrefixCache, Statistics

_TOKEN = 1 << 32

State = Literal["out", "waiting", "prefilling", "decoding"]


class Job:
    """One request in the batch; `decoded` tokens of its response are counted, those since `_begun` are not yet.

    `salt` tells apart what must not share a prefix, such as requests of two adapters.
    """

    __slots__ = ("_base", "_begun", "_due", "_target", "decoded", "number", "prompt", "salt", "state")

    def __init__(self, number: int, prompt: NDArray[np.int32], salt: int = 0) -> None:
        self.number, self.prompt, self.salt = number, prompt, salt
        self.decoded = 0
        self.state: State = "out"
        self._due = self._base = self._begun = 0
        self._target = -1


J = TypeVar("J", bound=Job)


class Batching(Generic[J]):
    """Requests that wait and run; `number` is their order of arrival, and each that runs arrived before all that wait.

    Times are seconds of whatever clock the caller keeps. Every call is about the moment of the last `advance`. `preemptions` counts them.
    """

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs
        self._waiting: OrderedDict[int, J] = OrderedDict()
        self._running: OrderedDict[int, J] = OrderedDict()
        self._prefills: OrderedDict[int, float] = OrderedDict()  # seconds each takes; the first is under way
        self._heap: list[tuple[int, int, J]] = []
        self._rates = [costs.rate(batch) * _TOKEN for batch in range(costs.slots + 1)]
        self._capacity = math.inf if costs.kv_tokens is None else costs.kv_tokens * _TOKEN
        self._prefixes = PrefixCache(costs)
        self._now = self._busy = 0.0
        self._standing = False
        self._upcoming: tuple[float, str] | None = None  # the next event, until something changes it
        # The context of all that run is `_context` plus the progress of each that decodes.
        self._progress = self._decoding = self._context = 0
        self._tokens = self.preemptions = self._prefilled = self._cached = 0

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that were added and hold no slot."""
        return len(self._waiting)

    def statistics(self, held: int = 0) -> Statistics:
        """See `Statistics`; `held` more requests wait elsewhere."""
        for job in self._running.values():
            self.count(job)
        numbers = (self.preemptions, self._tokens, self._prefilled, self._cached)
        return Statistics(self.running, self.waiting + held, *numbers, self._busy)

    # -- who is in

    def add(self, job: J) -> None:
        """A request that waits from now on; numbers must grow."""
        job.state = "waiting"
        self._waiting[job.number] = job

    def admit(self) -> J | None:
        """The first that waits gets a slot, if there is one and room for its context; None where there is not."""
        if self._standing or not self._waiting or len(self._running) >= self._costs.slots:
            return None
        job = next(iter(self._waiting.values()))
        context = job.prompt.size + job.decoded
        # Room for a token of each: else one would be preempted before anyone had a use of it.
        if self._running and self._used() + (context + len(self._running) + 1) * _TOKEN > self._capacity:
            return None
        del self._waiting[job.number]
        self._running[job.number] = job
        self._context += context * _TOKEN
        self._begin(job, context)
        return job

    def _begin(self, job: J, context: int) -> None:
        cached = self._prefixes.take(job.prompt, job.salt)
        self._cached += cached
        self._prefilled += context - cached
        job._target, job._base, job._begun = -1, job.decoded, 0
        seconds = self._costs.prefill_seconds(context - cached)
        if seconds > 0:
            job.state = "prefilling"
            self._prefills[job.number] = seconds
            self._upcoming = None
        else:
            self._decode(job)

    def _decode(self, job: J) -> None:
        job.state = "decoding"
        job._begun = self._progress
        self._decoding += 1
        self._context -= self._progress
        self._upcoming = None
        if job._due > job.decoded:
            self.expect(job, job._due)

    def expect(self, job: J, decoded: int) -> None:
        """`advance` is to return this running request when it has decoded so many tokens, more than it has now."""
        job._due = decoded
        if job.state == "decoding":
            job._target = job._begun + (decoded - job._base) * _TOKEN
            heapq.heappush(self._heap, (job._target, job.number, job))
            self._upcoming = None

    def remove(self, job: J) -> None:
        """Take a request out, wherever it is, with its tokens counted; again is nothing."""
        if job.state == "waiting":
            del self._waiting[job.number]
        elif job.state != "out":
            self._free(job)
        job.state = "out"
        if len(self._heap) > 64 + 4 * len(self._running):
            self._heap = [entry for entry in self._heap if self._is_valid(entry)]
            heapq.heapify(self._heap)

    def _free(self, job: J) -> None:
        self.count(job)  # what it had of a token under way is lost
        self._context -= (job.prompt.size + job._base) * _TOKEN - job._begun
        if job.state == "prefilling":
            del self._prefills[job.number]
        else:
            self._decoding -= 1
        del self._running[job.number]
        self._upcoming = None

    def count(self, job: J) -> int:
        """How many tokens of a request are decoded by now."""
        if job.state == "decoding":
            decoded = job._base + (self._progress - job._begun) // _TOKEN
            self._tokens += decoded - job.decoded
            job.decoded = decoded
        return job.decoded

    def remember(self, ids: NDArray[np.int32], salt: int = 0) -> None:
        """Context that was computed: a later prompt of this salt that begins with it needs no prefill for that."""
        self._prefixes.put(ids, salt)

    def forget_prefixes(self) -> None:
        """New weights: what was computed with the old ones is of no use for requests that start later."""
        self._prefixes.clear()

    # -- time

    def stand(self) -> None:
        """Nothing goes on until `go`."""
        self._standing, self._upcoming = True, None

    def go(self) -> None:
        """Go on after `stand`."""
        self._standing, self._upcoming = False, None

    def next_time(self) -> float:
        """When `advance` has something to do next; infinite where nothing runs or all stands."""
        return self._next()[0]

    def advance(self, now: float) -> list[J]:
        """Go on to `now`, or to the first moment before it when requests are due; returns these, in order.

        Call it until it returns none, and `admit` in between: what is due at one moment may end, and make room.
        """
        while True:
            when, what = self._next()
            if when > now:
                self._move(now)
                return []
            self._move(when)
            if what == "decoded":
                self._progress = self._heap[0][0]
                return self._due_now()
            if what == "prefilled":
                self._end_prefill()
            else:
                self._preempt()

    def approach(self, now: float) -> None:
        """Go on towards `now`, but not to what is due before it or then: what the caller does next comes before that."""
        self._move(min(now, self.next_time()))

    def _next(self) -> tuple[float, str]:
        """The next moment and its event; at one moment a request that ends comes before a preemption, which it may make needless."""
        if self._upcoming is None:
            self._upcoming = (math.inf, "") if self._standing else self._look_ahead()
        return self._upcoming

    def _look_ahead(self) -> tuple[float, str]:
        when, what = math.inf, ""
        if self._prefills:
            when, what = self._now + next(iter(self._prefills.values())), "prefilled"
        if self._decoding:
            full = self._full_at()
            if full is not None and (at := self._time_of(full)) <= when:
                when, what = at, "full"
            target = self._next_target()
            if target is not None and (at := self._time_of(target)) <= when:
                when, what = at, "decoded"
        return when, what

    def _time_of(self, progress: int) -> float:
        return self._now + max(0, progress - self._progress) / self._rates[self._decoding]

    def _next_target(self) -> int | None:
        while self._heap and not self._is_valid(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def _is_valid(self, entry: tuple[int, int, J]) -> bool:
        target, _, job = entry
        return job._target == target and job.state == "decoding"

    def _used(self) -> int:
        return self._context + self._decoding * self._progress

    def _full_at(self) -> int | None:
        """The progress at which no more context fits, where there is someone to preempt."""
        if self._capacity == math.inf or len(self._running) < 2:
            return None
        return self._progress + max(0, int(self._capacity) - self._used()) // self._decoding

    def _move(self, when: float) -> None:
        passed = when - self._now
        if passed <= 0:
            return
        if not self._standing:
            self._busy += passed * len(self._running)
            if self._decoding:
                progress = self._progress + round(passed * self._rates[self._decoding])
                target = self._next_target()
                self._progress = progress if target is None else min(progress, target - 1)  # there only when it is returned as due
            for number in self._prefills:
                self._prefills[number] -= passed
                break
        self._now = when

    def _due_now(self) -> list[J]:
        due, self._upcoming = list[J](), None
        while (target := self._next_target()) is not None and target <= self._progress:
            job = heapq.heappop(self._heap)[2]
            job._target = -1
            self.count(job)
            due.append(job)
        return due

    def _end_prefill(self) -> None:
        number, _ = self._prefills.popitem(last=False)
        self._decode(self._running[number])

    def _preempt(self) -> None:
        youngest = self._running[next(reversed(self._running))]
        self._free(youngest)
        self.preemptions += 1
        youngest.state = "waiting"
        self._waiting[youngest.number] = youngest
        self._waiting.move_to_end(youngest.number, last=False)
