"""Whatever is asked, cancelled, failed and closed, and when: each asker of a micro-batcher gets its own result or the reason."""

import asyncio
from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from agent_loop.errors import RewardClosedError
from agent_loop.rewards.batching import MicroBatcher
from producer.simulate import virtual_time

TIMES = st.integers(0, 60)


@dataclass(frozen=True)
class Ask:
    """An item that is asked at a time, and perhaps cancelled later; what becomes of it is up to its kind."""

    at: int
    cancelled_after: int | None
    kind: str


ASKS = st.lists(st.builds(Ask, TIMES, st.none() | st.integers(0, 30), st.sampled_from(["good", "good", "bad", "fatal"])), max_size=25)


@settings(max_examples=150)
@given(
    asks=ASKS,
    most=st.integers(1, 5),
    window=st.integers(0, 10),
    at_once=st.integers(1, 3),
    takes=st.integers(0, 20),
    closes=st.none() | TIMES,
)
def test_each_asker_gets_its_own_answer(asks: list[Ask], most: int, window: int, at_once: int, takes: int, closes: int | None) -> None:
    batches: list[list[int]] = []
    running = 0

    async def work(numbers: list[int]) -> list[Any]:
        nonlocal running
        batches.append(numbers)
        running += 1
        assert running <= at_once
        try:
            await asyncio.sleep(takes)
        finally:
            running -= 1
        if any(asks[number].kind == "fatal" for number in numbers):
            raise LookupError("all of them")
        return [ValueError(str(number)) if asks[number].kind == "bad" else number for number in numbers]

    async def one(batcher: MicroBatcher[int, int], number: int) -> Any:
        await asyncio.sleep(asks[number].at)
        try:
            return await batcher(number)
        except Exception as error:  # noqa: BLE001 - looked at below
            return error

    async def main() -> tuple[list[Any], float]:
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            async with MicroBatcher[int, int](work, most=most, window=window, at_once=at_once) as batcher:
                calls = [tasks.create_task(one(batcher, number)) for number in range(len(asks))]
                for ask, call in zip(asks, calls, strict=True):
                    if ask.cancelled_after is not None:
                        loop.call_later(ask.at + ask.cancelled_after, call.cancel)
                if closes is None:
                    await asyncio.wait(calls) if calls else None
                else:
                    await asyncio.sleep(closes)
            closed = loop.time()
            assert running == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return [None if call.cancelled() else call.result() for call in calls], closed

    answers, closed = virtual_time.run(main())
    assert all(len(batch) <= most for batch in batches)
    sent = [number for batch in batches for number in batch]
    assert len(sent) == len(set(sent))
    for number, (ask, answer) in enumerate(zip(asks, answers, strict=True)):
        if answer is None:
            assert ask.cancelled_after is not None
        elif isinstance(answer, RewardClosedError):
            assert closes is not None
            assert ask.at + window + takes * (1 + len(asks)) >= closed or ask.at >= closed
        elif isinstance(answer, LookupError):
            assert any(number in batch and any(asks[other].kind == "fatal" for other in batch) for batch in batches)
        elif isinstance(answer, ValueError):
            assert (ask.kind, str(answer)) == ("bad", str(number))
        else:
            assert (ask.kind, answer) == ("good", number)
