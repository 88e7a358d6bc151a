"""Shows that the model of continuous batching gives each request its slot and its end when a naive model, token by token, does."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_loop.engines.simulated_batching import Batching, Job
from agent_loop.engines.simulated_costs import CostModel, PrefixCache


class Asked(NamedTuple):
    """A request: when it comes, and how many tokens its prompt and its response have."""

    at: float
    prompt: int
    length: int


# -- the naive model ---------------------------------------------------------------------------------------------


class Naive:
    """All requests one by one, to the next token of any of them, in fractions."""

    def __init__(self, costs: CostModel, asked: list[Asked]) -> None:
        self.costs, self.asked = costs, asked
        self.coming = list(range(len(asked)))
        self.waiting: list[int] = []
        self.running: list[int] = []
        self.prefill: dict[int, Fraction] = {}
        self.done = [Fraction(0)] * len(asked)
        self.ends: dict[int, Fraction] = {}
        self.now, self.preemptions = Fraction(0), 0
        while len(self.ends) < len(asked):
            self.happen()
            self.go_on()

    def used(self) -> Fraction:
        return sum((self.asked[one].prompt + self.done[one] for one in self.running), Fraction(0))

    def decoding(self) -> list[int]:
        return [one for one in self.running if one not in self.prefill]

    def happen(self) -> None:
        """What happens at this moment: ends, arrivals, slots for those that wait, and the end of a preemption's victim."""
        for one in [one for one in self.decoding() if self.done[one] == self.asked[one].length]:
            self.running.remove(one)
            self.ends[one] = self.now
        while self.coming and Fraction(self.asked[self.coming[0]].at) <= self.now:
            self.waiting.append(self.coming.pop(0))
        while self.waiting and len(self.running) < self.costs.slots and self.fits(self.waiting[0]):
            one = self.waiting.pop(0)
            self.running.append(one)
            if self.costs.prefill_tokens_per_second < math.inf:
                self.prefill[one] = (self.asked[one].prompt + self.done[one]) / Fraction(self.costs.prefill_tokens_per_second)
        while self.costs.kv_tokens and len(self.running) > 1 and self.decoding() and self.used() >= self.costs.kv_tokens:
            youngest = self.running.pop()
            self.prefill.pop(youngest, None)
            self.done[youngest] = Fraction(math.floor(self.done[youngest]))
            self.waiting.insert(0, youngest)
            self.preemptions += 1

    def fits(self, one: int) -> bool:
        if self.costs.kv_tokens is None or not self.running:
            return True
        return self.used() + self.asked[one].prompt + self.done[one] + len(self.running) + 1 <= self.costs.kv_tokens

    def go_on(self) -> None:
        """To the next token, arrival or end of a prefill, or to where the cache is full."""
        decoding = self.decoding()
        rate = Fraction(self.costs.tokens_per_second or 1)
        if self.costs.half_batch < math.inf:
            rate /= 1 + len(decoding) / Fraction(self.costs.half_batch)
        steps = [(1 - self.done[one] % 1) / rate for one in decoding]
        steps += [Fraction(self.asked[self.coming[0]].at) - self.now] if self.coming else []
        steps += [next(iter(self.prefill.values()))] if self.prefill else []
        if self.costs.kv_tokens and decoding and len(self.running) > 1:
            steps += [(self.costs.kv_tokens - self.used()) / (len(decoding) * rate)]
        if not steps:
            return
        step = min(steps)
        self.now += step
        for one in decoding:
            self.done[one] += rate * step
        for one in list(self.prefill)[:1]:
            self.prefill[one] -= step
            if not self.prefill[one]:
                del self.prefill[one]


# -- the model ---------------------------------------------------------------------------------------------------

Look = Callable[[Batching[Job], list[Job]], None]


def ends_of(
    costs: CostModel, asked: list[Asked], look: Look = lambda batch, jobs: None, pause: float = 0.0
) -> tuple[dict[int, float], Batching[Job]]:
    """When each request ends; `look` is called after everything that happens, and every `pause` seconds."""
    batch = Batching[Job](costs)
    jobs = [Job(number, np.arange(one.prompt, dtype=np.int32)) for number, one in enumerate(asked)]
    coming, ends, now = list(jobs), dict[int, float](), 0.0

    def admit() -> None:
        while (job := batch.admit()) is not None:
            batch.expect(job, asked[job.number].length)

    while len(ends) < len(jobs):
        times = [batch.next_time()] + ([asked[coming[0].number].at] if coming else []) + ([now + pause] if pause else [])
        now = min(times)
        assert now < math.inf, "requests wait, and nothing is ever to happen"
        while due := batch.advance(now):
            for job in due:
                assert job.decoded == asked[job.number].length
                batch.remove(job)
                ends[job.number] = now
            admit()
        while coming and asked[coming[0].number].at <= now:
            batch.add(coming.pop(0))
        admit()
        look(batch, jobs)
    return ends, batch


def asked_of(most_tokens: int = 12) -> st.SearchStrategy[list[Asked]]:
    times = st.integers(0, 40).map(lambda quarter: quarter / 4)  # exact in binary, so that what is at once is so in both models
    one = st.builds(Asked, times, st.integers(1, 6), st.integers(1, most_tokens))
    return st.lists(one, min_size=1, max_size=8).map(sorted)


def agree(costs: CostModel, asked: list[Asked]) -> Naive:
    naive, (ends, batch) = Naive(costs, asked), ends_of(costs, asked)
    assert ends == pytest.approx({number: float(at) for number, at in naive.ends.items()}, rel=1e-6)
    assert batch.statistics().preemptions == naive.preemptions
    assert batch.statistics().tokens == sum(one.length for one in asked)
    return naive


@settings(deadline=None)
@given(asked_of(), st.integers(1, 4))
def test_requests_end_when_the_naive_model_ends_them_at_a_constant_rate(asked: list[Asked], slots: int) -> None:
    agree(CostModel(slots, 4.0), asked)


@settings(deadline=None)
@given(asked_of(), st.integers(1, 4), st.sampled_from([0.5, 1, 3, 7, 64]))
def test_and_at_a_rate_that_falls_with_the_batch(asked: list[Asked], slots: int, half: float) -> None:
    agree(CostModel(slots, 4.0, half_batch=half), asked)


@settings(deadline=None)
@given(asked_of(), st.integers(1, 4))
def test_and_with_prefills_one_after_the_other(asked: list[Asked], slots: int) -> None:
    agree(CostModel(slots, 4.0, prefill_tokens_per_second=8.0), asked)


@settings(deadline=None)
@given(asked_of(), st.integers(1, 6), st.integers(1, 40), st.sampled_from([8.0, math.inf]))
def test_and_where_the_youngest_is_preempted_as_the_cache_is_full(asked: list[Asked], slots: int, kv: int, prefill: float) -> None:
    agree(CostModel(slots, 4.0, kv_tokens=kv, prefill_tokens_per_second=prefill), asked)


def test_preemption_happens_and_its_prefill_is_paid_again() -> None:
    asked = [Asked(0.0, 4, 8), Asked(0.0, 4, 8)]
    costs = CostModel(4, 4.0, kv_tokens=16)
    ends, batch = ends_of(costs, asked)
    assert agree(costs, asked).preemptions == 1  # at 4 tokens each
    assert ends == pytest.approx({0: 2.0, 1: 3.0})
    assert batch.statistics().prefill_tokens == 4 + 4 + 8


@settings(max_examples=50, deadline=None)
@given(asked_of(), st.integers(1, 6), st.integers(1, 40), st.sampled_from([math.inf, 3.0]))
def test_no_more_context_than_fits_and_every_token_in_the_end(asked: list[Asked], slots: int, kv: int, half: float) -> None:
    costs = CostModel(slots, 5.0, half_batch=half, kv_tokens=kv, prefill_tokens_per_second=7.0)

    def look(batch: Batching[Job], jobs: list[Job]) -> None:
        running = [job for job in jobs if job.state in ("prefilling", "decoding")]
        assert len(running) == batch.running <= slots
        assert len(running) == 1 or sum(job.prompt.size + batch.count(job) for job in running) <= kv

    ends, batch = ends_of(costs, asked, look, pause=0.1)
    assert len(ends) == len(asked)
    assert batch.statistics().tokens == sum(one.length for one in asked)


@settings(max_examples=50, deadline=None)
@given(asked_of(), st.integers(1, 4), st.sampled_from([math.inf, 3.0]))
def test_no_slot_is_idle_while_a_request_waits_and_slots_are_given_in_order(asked: list[Asked], slots: int, half: float) -> None:
    order: list[int] = []

    def look(batch: Batching[Job], jobs: list[Job]) -> None:
        assert batch.running == slots or batch.waiting == 0
        order.extend(job.number for job in jobs if job.state == "decoding" and job.number not in order)
        if waiting := [job.number for job in jobs if job.state == "waiting"]:
            assert min(waiting) > max(order)

    ends, batch = ends_of(CostModel(slots, 5.0, half_batch=half), asked, look)
    assert len(ends) == len(asked)
    assert batch.statistics().busy_slot_seconds <= slots * max(ends.values()) + 1e-9


@settings(deadline=None)
@given(asked_of(), st.integers(1, 4))
def test_slots_are_busy_as_long_as_their_requests_take(asked: list[Asked], slots: int) -> None:
    _, batch = ends_of(CostModel(slots, 4.0), asked)
    assert batch.statistics().busy_slot_seconds == pytest.approx(sum(one.length for one in asked) / 4.0)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["stand", "go"]), st.floats(0.01, 3)), max_size=8), st.integers(1, 9))
def test_standing_costs_exactly_its_time(stops: list[tuple[str, float]], length: int) -> None:
    batch = Batching[Job](CostModel(1, 2.0))
    batch.add(Job(0, np.ones(1, np.int32)))
    job = batch.admit()
    assert job is not None
    batch.expect(job, length)
    now = ran = 0.0
    for what, seconds in stops:
        batch.stand() if what == "stand" else batch.go()
        if what == "go" and ran + seconds > length / 2:
            break
        ran += seconds if what == "go" else 0.0
        now += seconds
        assert batch.advance(now) == [] or ran == pytest.approx(length / 2)
        assert batch.count(job) <= ran * 2 + 1e-6
    batch.go()
    if ran < length / 2 - 1e-6:
        assert batch.next_time() == pytest.approx(now + length / 2 - ran)
        assert batch.advance(batch.next_time()) == [job]


@settings(deadline=None)
@given(st.integers(1, 32), st.floats(0.5, 100), st.floats(0, 2))
def test_a_call_at_the_moment_of_an_end_or_after_it_comes_before_it(length: int, rate: float, late: float) -> None:
    """So a request that is interrupted as it ends lacks its last token, and no whole response is called aborted."""
    batch = Batching[Job](CostModel(1, rate))
    batch.add(job := Job(0, np.ones(1, np.int32)))
    assert batch.admit() is job
    batch.expect(job, length)
    end = batch.next_time()
    batch.approach(end + late)
    assert batch.count(job) == length - 1
    assert batch.next_time() == pytest.approx(end)
    assert batch.advance(end + late) == [job]
    assert job.decoded == length


def test_removed_requests_leave_nothing_behind() -> None:
    batch = Batching[Job](CostModel(2, 1.0))
    for number in range(10_000):
        batch.add(job := Job(number, np.ones(1, np.int32)))
        if admitted := batch.admit():
            batch.expect(admitted, 10**6)
        batch.remove(job)
    assert (batch.running, batch.waiting) == (0, 0)
    assert len(batch._heap) < 100
    assert batch.next_time() == math.inf


# -- the prefix cache --------------------------------------------------------------------------------------------


def cache_of(tokens: int, block: int = 4) -> PrefixCache:
    return PrefixCache(CostModel(prefix_cache_tokens=tokens, block_tokens=block))


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_a_prompt_pays_for_what_no_earlier_prompt_began_with(first: list[int], second: list[int]) -> None:
    cache = cache_of(1000)
    assert cache.take(np.array(first, np.int32)) == 0
    common = next((place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    assert cache.take(np.array(second, np.int32)) == min(common // 4 * 4, len(second) - 1)


def test_blocks_that_were_not_used_for_longest_are_forgotten_first() -> None:
    cache = cache_of(8 * 4)
    prompts = [np.full(13, token, np.int32) for token in range(4)]
    assert [cache.take(prompt) for prompt in prompts[:2]] == [0, 0]  # 3 blocks each
    assert cache.take(prompts[0]) == 12
    assert cache.take(prompts[2]) == 0  # forgets the last block of the second
    assert cache.take(prompts[0]) == 12
    assert cache.take(prompts[1]) == 8
    cache.clear()
    assert cache.take(prompts[0]) == 0


def test_no_capacity_remembers_nothing() -> None:
    cache = cache_of(3)
    assert [cache.take(np.ones(20, np.int32)) for _ in range(2)] == [0, 0]


# -- costs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"slots": 0},
        {"slots": 2.5},
        {"tokens_per_second": 0.0},
        {"tokens_per_second": math.inf},
        {"tokens_per_second": math.nan},
        {"half_batch": 0.0},
        {"half_batch": 4.0},
        {"prefill_tokens_per_second": -1.0},
        {"block_tokens": 0},
        {"kv_tokens": 0},
        {"prefix_cache_tokens": -1},
        {"update_seconds": -1.0},
        {"update_seconds": math.inf},
    ],
)
def test_bad_costs_are_refused_by_name(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        CostModel(**arguments)  # type: ignore[arg-type]


def test_the_rate_halves_at_half_batch() -> None:
    assert [CostModel(64, 50.0, half_batch=8).rate(batch) for batch in (8, 24)] == [25.0, 12.5]
    assert CostModel(64, 50.0).rate(64) == 50.0
