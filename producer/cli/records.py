"""Groups and counts as plain records: what `--json` prints and the tables show."""

from collections.abc import Sequence
from typing import Any

from buffer import AuditReport, ReplayBuffer, RolloutGroup, RolloutState

Record = dict[str, Any]


async def status_of(buffer: ReplayBuffer) -> Record:
    """Counts by task and status, prompts drawn, last steps."""
    tasks = {name: await _task(buffer, name) for name in await buffer.task_names()}
    return {"drawn": sum(task["drawn"] for task in tasks.values()), "last_step": await buffer.last_step(), "tasks": tasks}


async def _task(buffer: ReplayBuffer, name: str) -> Record:
    counts = await buffer.counts(name)
    # Each drawn prompt is in exactly one group; `audit` checks that, at the price of counting them.
    return {"drawn": sum(counts.values()), "last_step": await buffer.last_step(name), "counts": counts}


def audit_of(report: AuditReport) -> Record:
    """What `audit` found."""
    return {"ok": report.ok, "problems": list(report.problems), "drawn": report.drawn, "counts": report.counts}


def group_in_short(group: RolloutGroup) -> Record:
    """One line of `query`."""
    return {
        **_head(group),
        "rollouts": len(group.rollouts),
        "tokens": sum(rollout.response_ids.size for rollout in group.rollouts),
        "versions": version_span(group.rollouts),
        "score_mean": _mean([rollout.score for rollout in group.rollouts]),
        "reward_mean": _mean([rollout.reward for rollout in group.rollouts]),
        "errors": [rollout.error for rollout in group.rollouts if rollout.error is not None],
    }


def group_in_full(group: RolloutGroup) -> Record:
    """Everything that is stored of a group."""
    first = group.rollouts[0]
    prompt = {name: getattr(first, name) for name in ("row", "prompt", "messages", "media", "sampling")}
    prompt["prompt_ids"] = None if first.prompt_ids is None else first.prompt_ids.tolist()
    return {**_head(group), **prompt, "rollouts": [_rollout(rollout) for rollout in group.rollouts]}


def _head(group: RolloutGroup) -> Record:
    return {
        "group_id": group.group_id,
        "task_name": group.task_name,
        "status": group.status,
        "position": None if group.position is None else group.position._asdict(),
        "consumed_step": group.consumed_step,
        "filter_reason": group.filter_reason,
    }


_PLAIN = ("rollout_id", "index", "status", "attempts", "interruptions", "error", "finish_reason", "score", "reward")
_PLAIN_TOO = ("reward_parts", "metrics", "text")
_ARRAYS = ("response_ids", "logprobs", "loss_mask", "versions")


def _rollout(rollout: RolloutState) -> Record:
    return {
        **{name: getattr(rollout, name) for name in (*_PLAIN, *_PLAIN_TOO)},
        "turns": [turn._asdict() for turn in rollout.turns],
        **{name: getattr(rollout, name).tolist() for name in _ARRAYS},
    }


def version_span(rollouts: Sequence[RolloutState]) -> list[int] | None:
    """The oldest and the newest version among all tokens; None where there are none."""
    arrays = [rollout.versions for rollout in rollouts if rollout.versions.size]
    return [int(min(a.min() for a in arrays)), int(max(a.max() for a in arrays))] if arrays else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if isinstance(value, int | float)]  # a file that was edited may have text there
    return sum(known) / len(known) if known else None
