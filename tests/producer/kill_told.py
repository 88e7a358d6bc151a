"""The parts of a training run that tell a ledger what they do; `kill_run.py` is the run."""

import asyncio
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from agent_loop import SingleTurnAgentLoop
from buffer import ReplayBuffer, RolloutGroup, RolloutState, Share, Status
from buffer.staleness import NO_VERSION
from tests.zygote import Say


def digest(state: RolloutState) -> int:
    """Of a response's tokens, log-probabilities and versions."""
    parts = (state.response_ids, state.logprobs, state.versions)
    return zlib.crc32(b"".join(np.ascontiguousarray(part).tobytes() for part in parts))


def members(group: RolloutGroup) -> list[tuple[str, int, int, int, int]]:
    """Of each member its status, tokens, digest, the version its staleness is counted from, and its newest version."""
    return [
        (
            state.status,
            int(state.response_ids.size),
            digest(state),
            int(state.effective_versions.min(initial=NO_VERSION)),
            int(state.versions.max(initial=0)),
        )
        for state in group.rollouts
    ]


class ToldBuffer(ReplayBuffer):
    """Says before what it is asked for, and after what was acknowledged."""

    say: Say

    async def draw(self, task_name: str, rows: Sequence[Any], **options: Any) -> list[int]:
        """See `ReplayBuffer`."""
        self.say("drawing", task=task_name)
        ids = await super().draw(task_name, rows, **options)
        self._drawn(task_name, ids, rows)
        return ids

    async def draw_and_start(self, task_name: str, rows: Sequence[Any], **options: Any) -> list[RolloutGroup]:
        """See `ReplayBuffer`."""
        self.say("drawing", task=task_name)
        groups = await super().draw_and_start(task_name, rows, **options)
        self._drawn(task_name, [group.group_id for group in groups], rows)
        return groups

    def _drawn(self, task_name: str, ids: Sequence[int], rows: Sequence[Any]) -> None:
        self.say("drawn", task=task_name, groups=ids, rows=[[*row.position, row.row["answer"]] for row in rows])

    async def claim(self, task_name: str, n: int, **options: Any) -> list[RolloutGroup]:
        """See `ReplayBuffer`."""
        self.say("claiming", task=task_name)
        groups = await super().claim(task_name, n, **options)
        self.say("claimed", groups=[group.group_id for group in groups])
        return groups

    async def put(self, group: RolloutGroup) -> None:
        """See `ReplayBuffer`."""
        self.say("storing", group=group.group_id)
        await super().put(group)
        self.say("stored", group=group.group_id, status=group.status, members=members(group))

    async def checkpoint(self, group: RolloutGroup) -> None:
        """See `ReplayBuffer`."""
        held = members(group)
        self.say("checkpointing", group=group.group_id)
        await super().checkpoint(group)
        self.say("checkpointed", group=group.group_id, members=held)

    async def take(self, task_name: str, n: int, *, step: int, **options: Any) -> list[RolloutGroup]:
        """See `ReplayBuffer`."""
        self.say("taking", task=task_name, step=step)
        groups = await super().take(task_name, n, step=step, **options)
        self.say("taken", task=task_name, step=step, groups=[group.group_id for group in groups])
        return groups

    async def take_together(self, shares: Sequence[Share], *, step: int, **options: Any) -> dict[str, list[RolloutGroup]]:
        """See `ReplayBuffer`."""
        self.say("taking", task=None, step=step)
        taken = await super().take_together(shares, step=step, **options)
        for task, groups in taken.items():
            if groups:
                self.say("taken", task=task, step=step, groups=[group.group_id for group in groups])
        return taken

    async def expire(self, task_name: str, **options: Any) -> int:
        """See `ReplayBuffer`."""
        self.say("expiring", task=task_name, version=options["version"])
        n = await super().expire(task_name, **options)
        self.say("expired", task=task_name, n=n)
        return n

    async def commit(self, step: int, **options: Any) -> int:
        """See `ReplayBuffer`."""
        self.say("committing", step=step)
        n = await super().commit(step, **options)
        self.say("committed", step=step)
        return n

    async def resume(self, step: int, **options: Any) -> Any:
        """See `ReplayBuffer`."""
        self.say("resuming", step=step)
        report = await super().resume(step, **options)
        self.say("resumed", step=step, version=report.version, rewound=report.rewound, released=report.released)
        return report


class ToldLoop(SingleTurnAgentLoop):
    """Says which rollout it generates, how many tokens that had, and when it is done."""

    say: Say

    async def generate(self, state: RolloutState) -> RolloutState:
        """See `AgentLoop`."""
        rollout = [state.group_id, state.index]
        self.say("generating", rollout=rollout, tokens=int(state.response_ids.size))
        state = await super().generate(state)
        self.say("generated", rollout=rollout, reason=state.finish_reason)
        return state


async def judge(say: Say, state: RolloutState) -> float:
    """A reward on the event loop."""
    say("judging", rollout=[state.group_id, state.index])
    await asyncio.sleep(0)
    return float(state.row["answer"] % 3)


def judge_on_a_thread(say: Say, state: RolloutState) -> float:
    """A reward of the other kind."""
    say("judging", rollout=[state.group_id, state.index])
    return float(state.row["answer"] % 3)


async def judge_together(say: Say, group: RolloutGroup) -> list[float]:
    """A reward of whole groups; members that have theirs are not judged anew."""
    for state in group.rollouts:
        if state.status is Status.RUNNING:
            say("judging", rollout=[state.group_id, state.index])
    await asyncio.sleep(0)
    return [float(state.row["answer"] % 3) for state in group.rollouts]
