"""Shows that a `BufferDataset` hands out every batch once and in order, whatever is prefetched, called off, broken off or rewound."""

import asyncio
import copy
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.utils.data import DataLoader  # noqa: E402 - behind the check that torch is there
from torchdata.stateful_dataloader import StatefulDataLoader  # noqa: E402

from agent_loop import SamplingParams, SingleTurnAgentLoop  # noqa: E402
from agent_loop.engines.simulated import SimulatedEngine  # noqa: E402
from buffer import ReplayBuffer, RolloutGroup, Status  # noqa: E402
from buffer.errors import ResumeRequiredError, StepError  # noqa: E402
from producer import AsyncProduceStrategy, Producer, ReplayPromptSampler  # noqa: E402
from producer.data import BufferDataset, in_background  # noqa: E402
from producer.errors import ProducerError  # noqa: E402
from producer.experience import AdvantageConfig, ExperienceMaker, make_experience  # noqa: E402
from tests.buffer.groups import ids, put_all, url  # noqa: E402
from tests.experience.test_maker import group, rollout  # noqa: E402

WAIT = 60.0


def groups(*numbers: int) -> list[RolloutGroup]:
    """Groups whose members' rewards depend on their number, so that every batch moves the moments."""
    return [group(n, *(rollout(n, index, [n, 1], [2] * (1 + index), reward=float(n * index)) for index in range(2))) for n in numbers]


@pytest.fixture
async def buffer(tmp_path: Path) -> AsyncIterator[ReplayBuffer]:
    """Six batches of two groups, audited at the end."""
    async with ReplayBuffer.open(url(tmp_path)) as opened:
        await put_all(opened, groups(*range(1, 13)))
        yield opened
        report = await opened.audit()
        assert report.ok, report.problems


def dataset_of(buffer: ReplayBuffer, **options: Any) -> BufferDataset:
    return BufferDataset(buffer, 2, **{"task_name": "default", "make": ids, "wait": False} | options)


async def in_a_thread(work: Callable[..., Any], *arguments: Any) -> Any:
    async with asyncio.timeout(WAIT):
        return await asyncio.to_thread(work, *arguments)


PAIRS = [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12]]


@pytest.mark.parametrize("prefetch", [0, 1, 9])
async def test_every_batch_once_and_in_order_however_often_it_is_iterated(buffer: ReplayBuffer, prefetch: int) -> None:
    dataset = dataset_of(buffer, prefetch=prefetch)

    def train() -> list[Any]:
        found = [next(iter(dataset)) for _ in range(2)]
        for number, batch in enumerate(DataLoader(dataset, batch_size=None)):
            found.append(batch)
            if number == 1:
                break
        return [*found, *dataset]

    assert await in_a_thread(train) == PAIRS
    assert dataset.step == 6
    assert [one.consumed_step for one in await buffer.query(limit=12)] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    await put_all(buffer, groups(20, 21))
    assert await in_a_thread(list, dataset) == [[20, 21]]  # what ended for want of groups goes on when there are some


async def test_items_are_tensors_with_their_step_and_the_weights_asked_for(buffer: ReplayBuffer) -> None:
    dataset = dataset_of(buffer, make=make_experience, reduction="token-mean")
    (first, *_) = await in_a_thread(list, DataLoader(dataset, batch_size=None))
    expected = make_experience(groups(1, 2)).to_torch(reduction="token-mean")
    assert set(first) == {*expected, "step"}
    assert all(torch.equal(first[name], tensor) for name, tensor in expected.items())
    assert first["step"].tolist() == [1, 1, 1, 1]
    assert dataset.metrics["rollouts"] == 4
    await buffer.resume(step=0)
    (whole, *_) = await in_a_thread(list, dataset_of(buffer, make=make_experience, tensors=False))
    np.testing.assert_array_equal(whole.advantages, first["advantages"].numpy())


async def test_nothing_is_taken_beyond_what_is_prefetched_nor_beyond_the_last_step(buffer: ReplayBuffer) -> None:
    dataset = dataset_of(buffer, prefetch=2, last_step=4)
    batches = iter(dataset)
    taken = []
    for _ in range(4):
        await in_a_thread(next, batches)
        await in_a_thread(dataset.close)  # what is on its way is made or called off
        await in_a_thread(dataset.run, asyncio.sleep(0))
        taken.append(await buffer.count("default", Status.CONSUMED) // 2)
    assert all(step <= n <= min(step + 2, 4) for step, n in enumerate(taken, 1)), taken
    with pytest.raises(StopIteration):
        next_or_raise(await in_a_thread(next, batches, None))
    assert await buffer.count("default", Status.CONSUMED) == 8


def next_or_raise(item: Any) -> None:
    if item is None:
        raise StopIteration


async def test_it_waits_for_groups_and_is_called_off_without_a_loss(buffer: ReplayBuffer) -> None:
    dataset = dataset_of(buffer, wait=True, prefetch=1)
    waiting = threading.Event()

    def train() -> Any:
        found = [next(iter(dataset)) for _ in range(6)]
        waiting.set()
        with pytest.raises(ProducerError, match="called off"):
            next(iter(dataset))
        return found

    async with asyncio.timeout(WAIT), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(asyncio.to_thread(train))
        await asyncio.to_thread(waiting.wait)
        while not running.done():
            await asyncio.to_thread(dataset.close)
        assert await running == PAIRS
        again = tasks.create_task(asyncio.to_thread(next, iter(dataset)))
        await put_all(buffer, groups(31, 32))
        assert await again == [31, 32]


async def test_what_was_called_off_in_the_midst_of_a_take_is_there_again(buffer: ReplayBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, taken, loaded = dataset_of(buffer), asyncio.Event(), buffer._loaded

    async def never(group_ids: list[int]) -> list[RolloutGroup]:
        taken.set()
        await asyncio.Event().wait()
        raise AssertionError(group_ids)

    def called_off() -> None:
        with pytest.raises(ProducerError, match="called off"):
            next(iter(dataset))

    monkeypatch.setattr(buffer, "_loaded", never)
    async with asyncio.timeout(WAIT), asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(asyncio.to_thread(called_off))
        await taken.wait()
        for n in range(3000):  # what is given back stands behind all of these
            tasks.create_task(buffer.cursor(f"task {n}"))
        await asyncio.to_thread(dataset.close)
        await waiting
        monkeypatch.setattr(buffer, "_loaded", loaded)
        assert await asyncio.to_thread(next, iter(dataset)) == PAIRS[0]


async def test_a_batch_that_could_not_be_made_is_the_next_one_again(buffer: ReplayBuffer) -> None:
    failing = [True, True]

    def make(taken: Any) -> Any:
        if ids(taken) == [3, 4] and failing and failing.pop():
            raise OSError("no disk")
        return ids(taken)

    def train() -> Any:
        dataset, found = dataset_of(buffer, make=make, prefetch=3), []
        for _ in range(2):
            with pytest.raises(OSError, match="no disk"):
                found += list(dataset)
        return [*found, *dataset]

    # The first attempt hands out the first batch and then fails; what `list` had is dropped by the error.
    assert await in_a_thread(train) == PAIRS[1:]


@pytest.mark.usefixtures("backend")
async def test_a_loaded_state_rewinds_also_what_was_taken_ahead(buffer: ReplayBuffer) -> None:
    maker = ExperienceMaker(AdvantageConfig("rloo", normalise=True))
    states: dict[int, Any] = {}

    def train() -> tuple[list[Any], list[Any]]:
        dataset, first = dataset_of(buffer, make=maker, prefetch=3, tensors=False), []
        for experience in dataset:
            first.append(experience)
            states[len(first)] = experience.running
            if len(first) == 4:
                break
        dataset.commit(1)
        dataset.load_state_dict({"step": 2})
        assert dataset.report is not None
        assert dataset.report.step == 2
        assert maker.state.running == states[2]
        return first, [*dataset]

    first, second = await in_a_thread(train)
    assert [experience.group_ids.tolist()[::2] for experience in first] == PAIRS[:4]
    assert [experience.group_ids.tolist()[::2] for experience in second] == PAIRS[2:]
    for one, other in zip(first[2:], second, strict=False):
        np.testing.assert_array_equal(one.advantages, other.advantages)
        assert one.running == other.running


@pytest.mark.usefixtures("backend")
async def test_a_new_process_goes_on_from_the_loader_of_the_checkpoint(tmp_path: Path) -> None:
    def loader_of(buffer: ReplayBuffer) -> tuple[BufferDataset, Any]:
        dataset = dataset_of(buffer, prefetch=2)
        return dataset, StatefulDataLoader(dataset, batch_size=None)

    def first_part(buffer: ReplayBuffer) -> Any:
        dataset, loader = loader_of(buffer)
        assert dataset.state_dict() == {"step": None}
        batches = iter(loader)
        found = [next(batches) for _ in range(3)]
        state = copy.deepcopy(loader.state_dict())  # of the checkpoint, after three batches
        next(batches)  # trained on, and lost with the process
        dataset.commit(2)
        return found, state

    def second_part(buffer: ReplayBuffer, state: Any) -> Any:
        dataset, loader = loader_of(buffer)
        with pytest.raises(ResumeRequiredError):
            next(iter(dataset))
        loader.load_state_dict(state)
        return list(loader)

    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        await put_all(buffer, groups(*range(1, 13)))
        found, state = await in_a_thread(first_part, buffer)
    async with ReplayBuffer.open(url(tmp_path)) as buffer:
        assert [*found, *await in_a_thread(second_part, buffer, state)] == PAIRS


async def test_beside_a_producer_weights_are_updated_from_the_training_thread(tmp_path: Path) -> None:
    rows = [{"prompt_ids": [1 + n], "number": n} for n in range(40)]
    async with ReplayBuffer.open(f"sqlite:///{tmp_path}/run.db") as buffer, SimulatedEngine(seed=1) as engine:
        loop = SingleTurnAgentLoop(engine, reward=lambda state: float(state.index), sampling=SamplingParams(max_tokens=4))
        strategy = AsyncProduceStrategy(buffer, staleness_threshold=1.0, max_staleness=1, progress=False)
        sampler = ReplayPromptSampler(rows, buffer, group_size=2, shuffle=False)
        async with Producer(strategy, loop, sampler, "math") as producer:
            dataset = BufferDataset(producer, 4, make=ExperienceMaker("rloo"), last_step=5)

            def train() -> list[int]:
                seen = []
                for batch in DataLoader(dataset, batch_size=None):
                    step = int(batch["step"][0])
                    assert int((engine.version - batch["versions"][batch["loss_mask"]]).max()) <= 1
                    seen += dataset.run(buffer.query(step=step))
                    dataset.run(engine.update_weights({"seed": step}, version=step))
                    dataset.commit(step, version=step)
                    if step == 3:  # a producer at work is stopped, and goes on behind the rewind
                        dataset.load_state_dict({"step": 3})
                        assert dataset.report is not None
                        assert dataset.report.version == 3
                return ids(seen)

            found = await in_a_thread(train)
        assert len(set(found)) == len(found) == 20
        assert dataset.metrics["rollouts"] == 8
        assert await buffer.count("math", Status.ARCHIVED) == 20
        assert (await buffer.audit()).ok


async def test_a_loader_that_looks_ahead_commits_by_the_step_of_the_batch(buffer: ReplayBuffer) -> None:
    data_loader = pytest.importorskip("accelerate.data_loader")
    dataset = dataset_of(buffer, make=make_experience)

    def train() -> list[tuple[int, int | None]]:
        steps = []
        for batch in data_loader.DataLoaderShard(dataset, batch_size=None):
            steps.append((int(batch["step"][0]), dataset.step))
            dataset.commit(steps[-1][0])
        return steps

    # It asks for the next batch before it gives this one.
    assert await in_a_thread(train) == [(1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 6)]


async def test_what_another_dataset_of_the_task_took_is_refused_before_anything_is_lost(buffer: ReplayBuffer) -> None:
    first, second = dataset_of(buffer), dataset_of(buffer)

    def in_turns() -> None:
        assert next(iter(first)) == PAIRS[0]
        assert next(iter(second)) == PAIRS[1]
        with pytest.raises(ProducerError, match="somebody else took groups of task 'default' at step 2 or later"):
            next(iter(first))
        assert list(second) == PAIRS[2:]

    await in_a_thread(in_turns)


async def test_of_two_that_take_at_the_same_moment_one_hears_of_it(buffer: ReplayBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, waits, wait_for = dataset_of(buffer, wait=True), asyncio.Event(), buffer.wait_for

    async def told(*arguments: Any) -> int:
        waits.set()
        return await wait_for(*arguments)

    monkeypatch.setattr(buffer, "wait_for", told)
    await in_a_thread(lambda: [next(iter(dataset)) for _ in PAIRS])

    def hears_of_it() -> None:
        for _ in range(2):  # again and again, until a state is loaded
            with pytest.raises(ProducerError, match="somebody else took"):
                next(iter(dataset))

    async with asyncio.timeout(WAIT), asyncio.TaskGroup() as tasks:
        tasks.create_task(asyncio.to_thread(hears_of_it))
        await waits.wait()  # it found step 7 free
        await put_all(buffer, groups(20))
        await buffer.take("default", 1, step=7)
        await put_all(buffer, groups(21, 22))
    await in_a_thread(dataset.load_state_dict, {"step": 6})
    assert [await in_a_thread(next, iter(dataset))] == [[20, 21]]


async def test_a_new_dataset_does_not_pass_over_what_was_taken_ahead(buffer: ReplayBuffer) -> None:
    third = threading.Event()

    def make(taken: list[RolloutGroup]) -> list[int]:
        if ids(taken) == PAIRS[2]:
            third.set()
        return ids(taken)

    before, after = dataset_of(buffer, make=make, prefetch=2), dataset_of(buffer)
    assert await in_a_thread(next, iter(before)) == PAIRS[0]
    await in_a_thread(third.wait)
    with pytest.raises(ProducerError, match="step 3 of task 'default' was taken, and an earlier BufferDataset handed out step 1 last"):
        await in_a_thread(next, iter(after))
    await in_a_thread(after.load_state_dict, before.state_dict())
    assert await in_a_thread(list, after) == PAIRS[1:]


async def test_a_state_beyond_the_run_is_refused(buffer: ReplayBuffer) -> None:
    dataset = dataset_of(buffer)
    assert await in_a_thread(next, iter(dataset)) == PAIRS[0]
    with pytest.raises(ValueError, match="step=99 lies beyond this run, whose last step is 1: the state is of another run"):
        await in_a_thread(dataset.load_state_dict, {"step": 99})
    assert await in_a_thread(list, dataset) == PAIRS[1:]


class Unwatched(torch.utils.data.IterableDataset):
    """A dataset that holds another, as libraries wrap them."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __iter__(self) -> Any:
        return iter(self.inner)


async def test_it_is_refused_where_it_cannot_work(buffer: ReplayBuffer) -> None:
    dataset = dataset_of(buffer)
    with pytest.raises(ProducerError, match="would block the event loop"):
        next(iter(dataset))
    with pytest.raises(TypeError, match=r"prefetch=\.\.\."):
        copy.copy(dataset)
    with pytest.raises(ProducerError, match="num_workers=0"):
        await in_a_thread(list, DataLoader(Unwatched(dataset), batch_size=None, num_workers=1, multiprocessing_context="fork"))
    for options, message in (
        ({"batch_size": 0}, "batch_size=0 must be 1 or more"),
        ({"prefetch": -1}, "prefetch=-1 must be 0 or more"),
        ({"task_name": None}, "name the task"),
    ):
        with pytest.raises(ValueError, match=message):
            BufferDataset(**{"source": buffer, "batch_size": 2, "task_name": "default"} | options)
    with pytest.raises(TypeError, match="neither a Producer nor a ReplayBuffer"):
        BufferDataset("sqlite:///run.db", 2)

    def badly_asked() -> None:
        with pytest.raises(ValueError, match="step=1 was not handed out yet, the last was 0"):
            dataset.commit(1)
        next(iter(dataset))
        for state in ({}, {"step": 1, "more": 2}):
            with pytest.raises(ValueError, match="is not the state of a BufferDataset"):
                dataset.load_state_dict(state)
        dataset.commit(1)
        with pytest.raises(StepError):
            dataset.load_state_dict({"step": 0})

    await in_a_thread(badly_asked)
    assert await in_a_thread(list, dataset) == PAIRS[1:]


def test_a_buffer_whose_loop_has_ended_is_told(tmp_path: Path) -> None:
    async def left_open() -> BufferDataset:
        async with ReplayBuffer.open(f"sqlite:///{tmp_path}/run.db") as buffer:
            return dataset_of(buffer)

    dataset = asyncio.run(left_open())
    with pytest.raises(ProducerError, match="does not run"):
        next(iter(dataset))


def taken_ahead_and_left(production: Any) -> BufferDataset:
    """A trainer that fails, with batches on their way."""
    with pytest.raises(OSError, match="no disk"), in_background(production) as producer:  # noqa: PT012 - the error is the block's
        dataset = BufferDataset(producer, 2, make=ids, prefetch=2)
        dataset.load_state_dict({"step": 3})
        next(iter(dataset))
        raise OSError("no disk")
    return dataset


def test_a_program_that_is_not_async_has_production_in_the_background(tmp_path: Path) -> None:
    @asynccontextmanager
    async def production() -> AsyncIterator[Producer]:
        rows = [{"prompt_ids": [1 + n]} for n in range(40)]
        async with ReplayBuffer.open(f"sqlite:///{tmp_path}/run.db") as buffer, SimulatedEngine(seed=1) as engine:
            loop = SingleTurnAgentLoop(engine, reward=lambda state: float(state.index), sampling=SamplingParams(max_tokens=4))
            sampler = ReplayPromptSampler(rows, buffer, group_size=2, shuffle=False)
            async with Producer(AsyncProduceStrategy(buffer, progress=False), loop, sampler, "math") as producer:
                yield producer

    with in_background(production) as producer:
        dataset = BufferDataset(producer, 2, make=ids, last_step=3)
        assert len(list(DataLoader(dataset, batch_size=None))) == 3
        dataset.commit(3)
    dataset = taken_ahead_and_left(production)
    assert not dataset._ahead or all(future.done() for future in dataset._ahead)

    @asynccontextmanager
    async def failing() -> AsyncIterator[None]:
        raise OSError("before")
        yield

    with pytest.raises(OSError, match="before"), in_background(failing):
        pass
