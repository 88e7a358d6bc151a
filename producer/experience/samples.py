"""Prompts with what belongs to them, and the groups that a source makes of them: outside of any buffer, for one call."""

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agent_loop import AgentLoop, SampledSequence, Sampler, SampleResponse, SamplingParams
from agent_loop.errors import first_error
from agent_loop.sampling import whole
from buffer import Position, RolloutGroup, RolloutState, Status
from buffer.rows import prompt_fields

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""Text, token ids, a chat, or a row of a dataset."""

Source = AgentLoop | Sampler
_TASK = "samples"
_GROUP_IDS = itertools.count(2**61)
"""Apart from those of any buffer: an agent loop knows what it runs by these numbers, and may run a producer's groups too."""


def rows_of(prompts: Sequence[Prompt], **columns: Sequence[Any] | None) -> list[dict[str, Any]]:
    """A row for each prompt, with the value of each column that belongs to it: "reference" of `references`, and so on.

    Raises:
        ValueError: unequal numbers, or a row that has the column already.
    """
    if isinstance(prompts, str | bytes | Mapping):
        raise ValueError(f"prompts={prompts!r:.60} is one prompt; give a list")
    rows = [_row(prompt) for prompt in prompts]
    for name, values in columns.items():
        if values is None:
            continue
        if len(values) != len(rows):
            raise ValueError(f"{len(rows)} prompts came with {len(values)} {name}; give one a prompt, however many samples it gets")
        column = name.removesuffix("s")
        for row, value in zip(rows, values, strict=True):
            if column in row:
                raise ValueError(f"a row has {column}={row[column]!r:.60} already; leave out {name}=, or the column")
            row[column] = value
    return rows


def _row(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, Mapping):
        row = dict(prompt)
    elif isinstance(prompt, str):
        row = {"prompt": prompt}
    elif len(prompt) and isinstance(prompt[0], Mapping):
        row = {"messages": list(prompt)}
    else:
        row = {"prompt_ids": np.asarray(prompt).tolist()}
    if row.get("prompt") is not None and not isinstance(row["prompt"], str):
        row["messages"] = row.pop("prompt")  # a chat, as datasets have it
    prompt_fields(row)
    return row


async def sampled(
    source: Source,
    rows: Sequence[dict[str, Any]],
    num_samples: int,
    sampling_params: SamplingParams | Mapping[str, Any] | None,
    judges: Mapping[str, Any],
) -> list[RolloutGroup]:
    """A judged group for each row, in their order."""
    if whole("num_samples", num_samples) < 1:
        raise ValueError(f"num_samples={num_samples} asks for nothing; it must be 1 or more")
    if isinstance(source, Sampler):
        responses = await source.generate_and_score(rows, **judges, sampling_params=sampling_params, num_samples=num_samples)
        return [_group(next(_GROUP_IDS), *one) for one in zip(rows, responses, strict=True)]
    if sampling_params is not None:
        raise ValueError("sampling_params are a Sampler's; an agent loop has its own (sampling=), which a row's `sampling` overrides")
    groups = [
        RolloutGroup.from_row(next(_GROUP_IDS), row, group_size=num_samples, task_name=_TASK, position=Position(0, place))
        for place, row in enumerate(rows)
    ]
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(source.generate_group(group)) for group in groups]
    except BaseExceptionGroup as errors:
        error = first_error(errors)
        raise error from error.__cause__
    return [task.result() for task in running]


def _group(group_id: int, row: dict[str, Any], response: SampleResponse) -> RolloutGroup:
    members = [_rollout(group_id, index, row, response, sequence) for index, sequence in enumerate(response.sequences)]
    return RolloutGroup(group_id, members, _TASK)


def _rollout(group_id: int, index: int, row: dict[str, Any], response: SampleResponse, sequence: SampledSequence) -> RolloutState:
    """As an agent loop would leave it; without a score it is left out with the reason."""
    return RolloutState(
        group_id,
        index,
        _TASK,
        Status.INTERRUPTED if sequence.finish_reason == "abort" else Status.COMPLETED,
        error=sequence.error,
        row=row,
        **prompt_fields(row) | {"prompt_ids": response.prompt_ids},
        response_ids=sequence.token_ids,
        logprobs=sequence.logprobs,
        loss_mask=np.ones(len(sequence.token_ids), np.uint8),
        versions=sequence.versions,
        finish_reason=sequence.finish_reason,
        text=sequence.text,
        score=sequence.score,
        reward=sequence.score,
    )
