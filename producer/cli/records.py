"""Groups and counts as plain records: what `--json` prints and the tables show."""

import os
import socket
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from buffer import Account, AuditReport, ReplayBuffer, RolloutGroup, RolloutState, Transition
from buffer.overview import ProducerOverview
from buffer.rows import drawn_fields

Record = dict[str, Any]


_STEPS = ("at", "last_step", "committed_step", "version", "timeline", "last_change", "rate_seconds", "abandoned")
_SIZES = ("schema_version", "database_bytes", "free_bytes", "payload_groups", "payload_bytes", "prefix_groups", "prefix_bytes")


async def status_of(buffer: ReplayBuffer) -> Record:
    """All that `buffer.overview` found."""
    found = await buffer.overview()
    return {
        **{name: getattr(found, name) for name in (*_STEPS, *_SIZES)},
        "drawn": sum(task.drawn for task in found.tasks.values()),
        "tasks": {name: asdict(task) | {"account": account_of(task.account)} for name, task in found.tasks.items()},
        "rewinds": [asdict(rewind) for rewind in found.rewinds],
        "failures": [asdict(failure) for failure in found.failures],
        "producers": [{**asdict(one), "alive": _is_alive(one)} for one in found.producers],
    }


def account_of(account: Account) -> Record:
    """What a task sampled and what became of it."""
    return {
        "generated": account.generated,
        "trained": account.trained.tokens,
        "waiting": account.waiting.tokens,
        "wasted": dict(account.wasted),
        "length_bias": account.length_bias,
        "coverage_bias": account.coverage_bias,
        "overdue": account.overdue,
    }


def _is_alive(producer: ProducerOverview) -> bool | None:
    """Whether its process is there; None on another machine."""
    if producer.host != socket.gethostname():
        return None
    try:
        os.kill(producer.pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def history_of(changes: Sequence[Transition]) -> list[Record]:
    """The changes of a group's status, the first first."""
    return [asdict(change) for change in changes]


def audit_of(report: AuditReport) -> Record:
    """What `audit` found."""
    return {"ok": report.ok, "problems": list(report.problems), "drawn": report.drawn, "pruned": report.pruned, "counts": report.counts}


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


def group_in_full(group: RolloutGroup, history: Sequence[Transition]) -> Record:
    """Everything that is stored of a group."""
    first = group.rollouts[0]
    prompt = {name: getattr(first, name) for name in ("row", "prompt", "messages", "media", "sampling")}
    # As it was drawn, without the turns that a loop added: those are the rollouts'.
    prompt |= {name: value for name, value in drawn_fields(first.row).items() if value is not None}
    prompt["prompt_ids"] = None if first.prompt_ids is None else first.prompt_ids.tolist()
    return {**_head(group), **prompt, "rollouts": [_rollout(rollout) for rollout in group.rollouts], "history": history_of(history)}


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
_PLAIN_TOO = ("reward_parts", "metrics", "text", "messages", "media")
_ARRAYS = ("response_ids", "logprobs", "loss_mask", "versions", "timelines")


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
