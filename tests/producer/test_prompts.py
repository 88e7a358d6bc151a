"""Prompts are drawn lazily, each exactly once whatever is cancelled or restarted, and a bad dataset is an error that says so."""

import asyncio
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from buffer import Position, ReplayBuffer, RolloutGroup, RolloutState, Status
from buffer.errors import CursorConflictError
from producer import PromptSampler, ReplayPromptSampler
from producer.errors import DatasetError
from producer.prompts import Tail


def rows(n: int) -> list[dict[str, Any]]:
    return [{"prompt_ids": [10 + index], "answer": index} for index in range(n)]


def answers(groups: list[RolloutGroup]) -> list[int]:
    return [group.rollouts[0].row["answer"] for group in groups]


class Recording:
    """A map-style dataset that writes down how it is used."""

    def __init__(self, n: int) -> None:
        self.rows, self.uses = rows(n), list[str]()

    def __len__(self) -> int:
        self.uses.append("len")
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.uses.append(f"row {index}")
        return self.rows[index]


class RecordingLoader(StatefulDataLoader):
    """A dataloader that writes down when its iterator is made."""

    uses: list[str]

    def __iter__(self) -> Any:
        self.uses.append("iter")
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        self.uses.append("state")
        return super().state_dict()


# -- lazily ----------------------------------------------------------------------------------------------------


async def test_the_constructor_reads_nothing(buffer: ReplayBuffer) -> None:
    dataset = Recording(4)
    sampler = ReplayPromptSampler(dataset, buffer, group_size=2, shuffle=False)
    assert dataset.uses == []
    await sampler.sample()
    assert dataset.uses == ["len", "row 0"]


async def test_the_iterator_of_a_dataloader_exists_only_after_the_first_sample(buffer: ReplayBuffer) -> None:
    loader = RecordingLoader(rows(4), batch_size=2, collate_fn=list)
    loader.uses = []
    sampler = ReplayPromptSampler(loader, buffer, group_size=2)
    assert loader.uses == []
    assert answers([await sampler.sample()]) == [0]
    assert "iter" in loader.uses


async def test_a_sampler_without_a_buffer_gives_pending_groups_over_epochs() -> None:
    sampler = PromptSampler(rows(3), group_size=2, shuffle=False)
    groups = [await sampler.sample() for _ in range(7)]
    assert answers(groups) == [0, 1, 2, 0, 1, 2, 0]
    assert [group.position for group in groups[2:4]] == [Position(0, 2), Position(1, 0)]
    assert {group.status for group in groups} == {Status.PENDING}
    assert len({group.group_id for group in groups}) == 7


async def test_each_epoch_has_a_shuffle_of_its_own_and_loses_no_row() -> None:
    sampler = PromptSampler(rows(20), group_size=1, seed=3)
    epochs = [answers(await sampler.sample_many("default", 20)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = PromptSampler(rows(20), group_size=1, seed=3)
    assert answers(await again.sample_many("default", 20)) == epochs[0]


# -- what was left behind ---------------------------------------------------------------------------------------


def left_behind(group_id: int, status: Status) -> RolloutGroup:
    return RolloutGroup(group_id, [RolloutState(group_id, index, status=status, prompt_ids=[5], row={"answer": -1}) for index in range(2)])


async def test_expired_then_interrupted_then_fresh(buffer: ReplayBuffer) -> None:
    sampler = ReplayPromptSampler(rows(8), buffer, group_size=2, shuffle=False)
    first = await sampler.sample()
    assert first.position == Position(0, 0)
    await buffer.put(left_behind(999, Status.INTERRUPTED))
    await buffer.put(left_behind(1000, Status.EXPIRED))
    second, third, fourth = [await sampler.sample() for _ in range(3)]
    assert [second.group_id, third.group_id, fourth.position] == [1000, 999, Position(0, 1)]
    assert {group.status for group in (first, second, third, fourth)} == {Status.RUNNING}
    assert fourth.group_id not in (first.group_id, 999, 1000)


async def test_only_what_is_asked_for_is_replayed(buffer: ReplayBuffer) -> None:
    await buffer.put(left_behind(999, Status.INTERRUPTED))
    await buffer.put(left_behind(1000, Status.EXPIRED))
    sampler = ReplayPromptSampler(rows(8), buffer, group_size=2, shuffle=False, replay=(Status.INTERRUPTED,))
    assert [group.group_id for group in await sampler.sample_many("default", 2)] == [999, 1001]
    with pytest.raises(ValueError, match=r"replay=.*cannot be offered again"):
        ReplayPromptSampler(rows(8), buffer, replay=(Status.FAILED,))


async def test_excluded_groups_are_passed_over(buffer: ReplayBuffer) -> None:
    for group_id in (5, 6):
        await buffer.put(left_behind(group_id, Status.INTERRUPTED))
    sampler = ReplayPromptSampler(rows(8), buffer, group_size=2, shuffle=False)
    assert [group.group_id for group in await sampler.sample_many("default", 2, exclude={5})] == [6, 7]


async def test_for_a_tail_batch_the_expired_come_first_then_those_stopped_most_often(buffer: ReplayBuffer) -> None:  # case 22
    for group_id, times in ((5, 1), (6, 3), (7, 2)):
        group = left_behind(group_id, Status.INTERRUPTED)
        group.rollouts[1].interruptions = times
        await buffer.put(group)
    await buffer.put(left_behind(8, Status.EXPIRED))
    sampler = ReplayPromptSampler(rows(8), buffer, group_size=2, shuffle=False)
    assert [group.group_id for group in await sampler.sample_many("default", 3, tail=Tail(True, 1))] == [8, 6, 7]
    assert [group.group_id for group in await sampler.sample_many("default", 2, tail=Tail(True, 1))] == [5, 9]


async def test_beside_tail_batches_what_was_left_behind_is_left_for_them(buffer: ReplayBuffer) -> None:
    for group_id, times in ((5, 1), (6, 3), (7, 2)):
        group = left_behind(group_id, Status.INTERRUPTED)
        group.rollouts[1].interruptions = times
        await buffer.put(group)
    await buffer.put(left_behind(8, Status.EXPIRED))
    sampler = ReplayPromptSampler(rows(8), buffer, group_size=2, shuffle=False)
    assert [group.group_id for group in await sampler.sample_many("default", 3, tail=Tail(False, 3))] == [5, 7, 9]
    assert [group.group_id for group in await sampler.sample_many("default", 3, tail=Tail(True, 3))] == [8, 6, 10]


async def test_a_sampler_refuses_a_strategys_other_buffer(buffer: ReplayBuffer) -> None:
    sampler = ReplayPromptSampler(rows(8), buffer, group_size=2)
    with pytest.raises(ValueError, match="different buffers"):
        await sampler.sample(buffer=ReplayBuffer.open("sqlite:///other.db"))


# -- identity ---------------------------------------------------------------------------------------------------


async def test_ids_go_on_after_a_restart_in_the_second_epoch(url: str) -> None:
    seen: list[RolloutGroup] = []
    for _ in range(3):
        async with ReplayBuffer.open(url) as buffer:
            sampler = PromptSampler(rows(3), group_size=2, shuffle=False)
            seen += await sampler.sample_many("default", 4, buffer=buffer)
    assert [group.position for group in seen] == [Position(n // 3, n % 3) for n in range(12)]
    assert len({state.rollout_id for group in seen for state in group.rollouts}) == 24


async def test_two_tasks_never_share_a_rollout_id(buffer: ReplayBuffer) -> None:
    samplers = {name: ReplayPromptSampler(rows(3), buffer, group_size=2) for name in ("math", "code")}
    groups = [await samplers[name].sample(name) for _ in range(4) for name in samplers]
    assert len({state.rollout_id for group in groups for state in group.rollouts}) == 16
    assert len({group.group_id for group in groups}) == 8


@pytest.mark.parametrize("loader", [False, True])
async def test_one_sampler_may_serve_two_tasks_in_turns(buffer: ReplayBuffer, loader: bool) -> None:
    dataset: Any = StatefulDataLoader(rows(8), batch_size=3, shuffle=True, collate_fn=list) if loader else rows(8)
    sampler = PromptSampler(dataset, group_size=1)
    drawn: dict[str, list[int]] = {"a": [], "b": []}
    for n in range(16):
        name = "ab"[n % 2]
        drawn[name] += answers([await sampler.sample(name, buffer=buffer)])
    assert drawn["a"] == drawn["b"]
    assert sorted(drawn["a"]) == list(range(8))


# -- bad datasets -----------------------------------------------------------------------------------------------


class Stream(IterableDataset[dict[str, Any]]):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(rows(4))


@pytest.mark.parametrize(
    ("dataset", "remedy"),
    [
        ((row for row in rows(4)), "pass a list"),
        (iter(rows(4)), "pass a list"),
        (DataLoader(Stream(), batch_size=None), "StatefulDataLoader, which takes the same arguments"),
        (DataLoader(rows(4), batch_size=2, collate_fn=list), "or pass the map-style dataset itself"),
    ],
)
async def test_a_dataset_that_cannot_be_resumed_is_refused_at_once(dataset: Any, remedy: str) -> None:
    with pytest.raises(DatasetError, match=f"cannot be resumed.*{remedy}"):
        PromptSampler(dataset)


@pytest.mark.parametrize(
    "dataset",
    [[], StatefulDataLoader([], batch_size=2), StatefulDataLoader(rows(1), batch_size=4, drop_last=True)],
    ids=["list", "loader", "drop"],
)
async def test_an_empty_dataset_is_an_error(buffer: ReplayBuffer, dataset: Any) -> None:
    sampler = ReplayPromptSampler(dataset, buffer)
    for _ in range(2):
        with pytest.raises(DatasetError, match="at least one row"):
            await sampler.sample()
    assert (await buffer.audit()).drawn.get("default", 0) == 0


class FaultyTokenizer:
    """Counts a token a letter."""

    def encode(self, text: str) -> list[int]:
        return [1] * len(text)

    def decode(self, token_ids: Any, *, skip_special_tokens: bool) -> str:
        return ""

    def apply_chat_template(self, conversation: Any, **options: Any) -> list[int]:
        return [1] * sum(len(message["content"]) for message in conversation)


circular: dict[str, Any] = {"prompt": "x"}
circular["self"] = circular

BAD_ROWS: list[tuple[Any, str]] = [
    ({"answer": 3}, "no prompt.*answer"),
    ({"prompt": ""}, "empty"),
    ({"prompt": None}, "no prompt"),
    ({"prompt_ids": []}, "empty"),
    ({"prompt_ids": [[1, 2], [3, 4]]}, "shape"),
    ({"prompt_ids": [1.5]}, "whole numbers"),
    ({"prompt_ids": [3, -1]}, "hold -1; token ids are 0 or more"),
    ({"prompt_ids": "12"}, "whole numbers|invalid literal"),
    ({"prompt_ids": [2**40]}, "out of bounds|too large|whole"),
    ({"prompt": [1, 2]}, "chat messages"),
    ({"prompt": ["a batch", "of texts"]}, "chat messages"),
    ({"prompt": "x" * 9}, "9 tokens, max_prompt_tokens is 8"),
    ({"prompt": [{"role": "user", "content": "y" * 10}]}, "10 tokens"),
    ({"prompt_ids": list(range(1, 20))}, "19 tokens"),
    ({"prompt": "x", "image": object()}, "object is not JSON"),
    ({"prompt": "x", "tags": {1, 2}}, "set is not JSON"),
    ({"prompt": "x", ("a", "b"): 1}, "keys must be"),
    (circular, "[Cc]ircular"),
    ("a text", "must be a mapping"),
    (None, "must be a mapping"),
    ([1, 2], "must be a mapping"),
]


@pytest.mark.parametrize(("bad", "why"), BAD_ROWS, ids=lambda value: ascii(value)[:30] if not isinstance(value, str) else None)
@pytest.mark.parametrize("loader", [False, True])
async def test_a_bad_row_is_named_or_recorded_as_failed(buffer: ReplayBuffer, bad: Any, why: str, loader: bool) -> None:
    good = [{"prompt": "ok"}, {"prompt": "fine"}]
    data: list[Any] = [good[0], bad, good[1]]

    def dataset() -> Any:
        return StatefulDataLoader(data, batch_size=2, collate_fn=list) if loader else data

    options: dict[str, Any] = {"group_size": 2, "shuffle": False, "max_prompt_tokens": 8, "tokenizer": FaultyTokenizer()}
    strict = ReplayPromptSampler(dataset(), buffer, **options)
    assert (await strict.sample()).rollouts[0].prompt == "ok"
    for _ in range(2):
        with pytest.raises(DatasetError, match=f"epoch 0, offset 1.*({why})"):
            await strict.sample()
    lenient = ReplayPromptSampler(dataset(), buffer, on_bad_row="fail", **options)
    assert (await lenient.sample()).rollouts[0].prompt == "fine"
    (failed,) = await buffer.query(status=Status.FAILED)
    assert failed.position == Position(0, 1)
    assert all(state.error for state in failed.rollouts)
    assert (await buffer.audit()).drawn["default"] == 3


async def test_any_text_is_a_good_prompt(buffer: ReplayBuffer) -> None:
    texts = ["half a pair: \ud800", "nul \0 and \x85", "\N{ROCKET}", "'; DROP TABLE groups; --"]
    sampler = ReplayPromptSampler([{"prompt": text} for text in texts], buffer, group_size=1, shuffle=False)
    assert [group.rollouts[0].prompt for group in await sampler.sample_many("default", 4)] == texts


@pytest.mark.parametrize("n", [1, 3])
async def test_nothing_but_bad_rows_ends_after_one_epoch(buffer: ReplayBuffer, n: int) -> None:
    sampler = ReplayPromptSampler([{"question": "?"}] * 5, buffer, on_bad_row="fail")
    with pytest.raises(DatasetError, match=r"rows in a row are bad, .*no prompt.*question"):
        await sampler.sample_many("default", n)
    assert (await buffer.counts("default"))[Status.FAILED] <= 10


async def test_without_a_buffer_a_bad_row_is_passed_over_or_an_error() -> None:
    data = [{"prompt": "a"}, {"no": 1}, {"prompt": "b"}]
    lenient = PromptSampler(data, shuffle=False, on_bad_row="fail", group_size=1)
    assert [group.rollouts[0].prompt for group in await lenient.sample_many("default", 3)] == ["a", "b", "a"]
    with pytest.raises(DatasetError, match="row 1"):
        await PromptSampler(data, shuffle=False).sample_many("default", 2)


async def test_good_rows_before_a_bad_one_are_not_left_running(buffer: ReplayBuffer) -> None:
    sampler = ReplayPromptSampler([{"prompt": "a"}, {"prompt": "b"}, {"no": 1}], buffer, group_size=1, shuffle=False)
    with pytest.raises(DatasetError, match="row 2"):
        await sampler.sample_many("default", 3)
    counts = await buffer.counts("default")
    assert (counts[Status.RUNNING], counts[Status.INTERRUPTED]) == (0, 2)
    assert [group.rollouts[0].prompt for group in await sampler.sample_many("default", 2)] == ["a", "b"]


class Flaky(Recording):
    """Fails on the second reading of anything, once, with a given error."""

    def __init__(self, n: int, error: BaseException) -> None:
        super().__init__(n)
        self.error: BaseException | None = error

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 1 and self.error is not None:
            error, self.error = self.error, None
            raise error
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("error", "loader"),
    # A dataloader takes StopIteration for the end of its epoch.
    [(OSError("disk"), True), (KeyError("column"), True), (OSError("disk"), False), (IndexError(1), False), (StopIteration(), False)],
)
async def test_a_row_that_cannot_be_read_is_named_and_not_passed_over(buffer: ReplayBuffer, error: Exception, loader: bool) -> None:
    flaky = Flaky(4, error)
    dataset: Any = StatefulDataLoader(flaky, batch_size=1, collate_fn=list) if loader else flaky
    sampler = ReplayPromptSampler(dataset, buffer, group_size=1, shuffle=False)
    assert answers([await sampler.sample()]) == [0]
    with pytest.raises(DatasetError, match=f"offset 1.*cannot be read: {type(error).__name__}") as caught:
        await sampler.sample()
    assert caught.value.__cause__ is not None
    assert answers(await sampler.sample_many("default", 3)) == [1, 2, 3]


async def test_columns_collated_into_one_mapping_are_refused(buffer: ReplayBuffer) -> None:
    sampler = ReplayPromptSampler(StatefulDataLoader(rows(8), batch_size=4), buffer)
    with pytest.raises(DatasetError, match="collate_fn=list"):
        await sampler.sample()


@pytest.mark.parametrize(
    "options",
    [{"group_size": 0}, {"max_prompt_tokens": 0}, {"on_bad_row": "skip"}, {"seed": -1}, {"seed": 1.5}, {"seed": "7"}],
    ids=lambda options: ascii(options)[1:-1],
)
async def test_bad_arguments_are_refused_at_construction(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        PromptSampler(rows(3), **options)


# -- restarts and changes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        (rows(9), {}),
        (rows(8), {"seed": 1}),
        (rows(8), {"shuffle": False}),
        (StatefulDataLoader(rows(8), batch_size=2, collate_fn=list), {}),
    ],
)
async def test_another_dataset_seed_or_shuffle_is_refused_on_resume(buffer: ReplayBuffer, changed: Any, options: dict[str, Any]) -> None:
    await ReplayPromptSampler(rows(8), buffer, group_size=1).sample()
    with pytest.raises(DatasetError, match="run was begun with"):
        await ReplayPromptSampler(changed, buffer, group_size=1, **options).sample()
    await ReplayPromptSampler(changed, buffer, group_size=1, **options).sample("another task")


async def test_a_dataloader_that_shrank_is_refused_on_resume(buffer: ReplayBuffer) -> None:
    await ReplayPromptSampler(StatefulDataLoader(rows(8), batch_size=4, collate_fn=list), buffer, group_size=1).sample_many("default", 7)
    shrunk = ReplayPromptSampler(StatefulDataLoader(rows(6), batch_size=4, collate_fn=list), buffer, group_size=1)
    with pytest.raises(DatasetError, match=r"same dataset|cannot be read"):
        await shrunk.sample()


async def test_two_samplers_for_one_task_are_found_out_and_lose_nothing(buffer: ReplayBuffer) -> None:
    one, other = (PromptSampler(rows(8), group_size=1, shuffle=False) for _ in range(2))
    await one.sample(buffer=buffer)
    await other.sample(buffer=buffer)
    with pytest.raises(CursorConflictError, match="one sampler for a task"):
        await one.sample(buffer=buffer)
    assert (await one.sample(buffer=buffer)).position == Position(0, 2)
    assert (await buffer.audit()).ok


def loader_of(data: Any, shuffle: str, batch_size: int | None, workers: int) -> StatefulDataLoader[Any]:
    """A dataloader as a fresh process would make it: seeds that a user gives are the same, the others are not."""
    generator = torch.Generator().manual_seed(5) if "seeded" in shuffle else None
    sampler = RandomSampler(data, generator=generator) if shuffle == "torch's sampler, seeded" else None
    return StatefulDataLoader(
        data,
        batch_size=batch_size,
        shuffle=None if sampler else shuffle != "no",
        sampler=sampler,
        num_workers=workers,
        collate_fn=list if batch_size else _same,
        generator=generator,
    )


SHUFFLES = ("no", "unseeded", "seeded", "torch's sampler, seeded")


@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("batch_size", [3, None])
@pytest.mark.parametrize("workers", [0, 2])
async def test_only_delivered_rows_of_a_dataloader_are_consumed(tmp_path: Path, shuffle: str, batch_size: int | None, workers: int) -> None:
    """A run that stops now and then, with a fresh loader each time, draws what one without stops draws, prefetched or not."""
    data = rows(7)
    stops = (2, 8, 7, 4) if workers else (1, 1, 3, 1, 6, 9)

    async def drawn(name: str, draws: Sequence[int]) -> list[int]:
        torch.manual_seed(0)
        torch_seeded = loader_of(data, shuffle, batch_size, workers)
        seen: list[int] = []
        for n in draws:
            async with ReplayBuffer.open(f"sqlite:///{tmp_path}/{name}.db") as buffer:
                seen += answers(await ReplayPromptSampler(torch_seeded, buffer, group_size=1, replay=()).sample_many("default", n))
            torch_seeded = loader_of(data, shuffle, batch_size, workers)
        return seen

    resumed = await drawn("resumed", stops)
    assert resumed == await drawn("whole", [sum(stops)])
    epochs = [tuple(resumed[start : start + 7]) for start in range(0, 21, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) == (1 if shuffle == "no" else 3)


async def test_a_random_sampler_without_a_generator_is_refused_at_once() -> None:
    with pytest.raises(DatasetError, match=r"RandomSampler has no generator.*shuffle=True"):
        PromptSampler(StatefulDataLoader(rows(4), batch_size=2, sampler=RandomSampler(rows(4)), collate_fn=list))


def _same(row: Any) -> Any:
    return row


# -- cancellation -----------------------------------------------------------------------------------------------


async def cancelled_after(turns: int, sampler: PromptSampler, n: int, task_name: str, buffer: ReplayBuffer) -> list[RolloutGroup]:
    """What `sample_many` gave, or nothing where it was cancelled after so many turns of the event loop."""
    task = asyncio.create_task(sampler.sample_many(task_name, n, buffer=buffer))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    try:
        return await task
    except asyncio.CancelledError:
        return []


@pytest.mark.parametrize("kind", ["map", "loader"])
@pytest.mark.parametrize("seed", range(3))
async def test_cancelling_a_draw_anywhere_loses_nothing_and_draws_nothing_twice(buffer: ReplayBuffer, seed: int, kind: str) -> None:
    chance = random.Random(seed)
    dataset: Any = rows(11) if kind == "map" else StatefulDataLoader(rows(11), batch_size=4, shuffle=True, collate_fn=list)
    sampler = ReplayPromptSampler(dataset, buffer, group_size=1)
    held: list[RolloutGroup] = []
    for _ in range(60):
        # From before its first step to far behind its last; some of the waiting is on threads, so the moment is random anyway.
        held += await cancelled_after(int(2 ** chance.uniform(0, 9)) - 1, sampler, chance.randint(1, 4), "default", buffer)
        if chance.random() < 0.3 and held:
            await buffer.release([held.pop().group_id])
    await buffer.cursor("default")  # a write: done after those whose callers were cancelled
    audit = await buffer.audit()
    assert audit.ok, audit.problems
    counts = await buffer.counts("default")
    assert counts[Status.RUNNING] == len({group.group_id for group in held}) == len(held)
    everything = await buffer.query(limit=10_000)
    positions = sorted(group.position for group in everything if group.position is not None)
    assert positions == [Position(n // 11, n % 11) for n in range(len(everything))], "each place of the stream exactly once"
    for start in range(0, len(everything) - 10, 11):
        epoch = [group for group in everything if group.position is not None and group.position.epoch == start // 11]
        assert sorted(answers(epoch)) == list(range(11))
    left = counts[Status.INTERRUPTED] + counts[Status.PENDING]
    again = await sampler.sample_many("default", left)
    assert {group.group_id for group in again} == {group.group_id for group in everything} - {group.group_id for group in held}


async def test_many_draw_at_once_and_each_prompt_goes_to_one(buffer: ReplayBuffer) -> None:
    sampler = ReplayPromptSampler(rows(10), buffer, group_size=1, shuffle=False)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(sampler.sample_many("default", n % 3 + 1)) for n in range(12)]
    drawn = [drawn for task in tasks for drawn in task.result()]
    assert sorted(g.position for g in drawn if g.position) == [Position(n // 10, n % 10) for n in range(24)]
