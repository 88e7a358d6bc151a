"""What is reported of a batch: one flat dict of numbers, ready for any logger."""

from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from buffer import Account, RolloutGroup, RolloutState, Status
from buffer.accounts import WINDOW, length_bias
from buffer.amounts import Amount
from producer.ledger import BatchRecord, Ledger

Metrics = dict[str, float]

STALENESS_SHOWN = 8
"""Groups staler than one less than this are counted together."""

_QUANTILES = (50, 95, 99)
_MARKS = frozenset({"reward_no_say", "reward_skipped", "reward_filled"})
_ENDED = (Status.COMPLETED, Status.INTERRUPTED, Status.FILTERED, Status.FAILED)


def batch_metrics(groups: Sequence[RolloutGroup], counts: Mapping[Status, int], record: BatchRecord, version: int) -> Metrics:
    """Metrics of a batch handed out.

    Args:
        groups: the batch.
        counts: of the task's groups in the buffer, after handing out.
        record: what happened since the batch before.
        version: of the policy now; staleness is counted from it.
    """
    metrics = _produced(record, len(groups)) | _engine(record)
    metrics |= {f"{status}/{name}": n for (status, name), n in record.reasons.items()}
    metrics |= {f"buffer/{status}": n for status, n in counts.items()}
    return metrics | batch_statistics(groups, version)


def _produced(record: BatchRecord, groups: int) -> Metrics:
    metrics: Metrics = {
        "produce/seconds": record.waited,
        "produce/period_seconds": record.period,
        "produce/started": record.started,
        "produce/tokens": record.tokens,
        "produce/tokens_per_second": _rate(record.tokens, record.period),
        "produce/groups_per_second": _rate(groups, record.period),
    }
    if record.between is not None:
        metrics["produce/train_seconds"] = record.between
    metrics |= {f"produce/{status}": record.ended.get(status, 0) for status in _ENDED}
    if record.group_seconds:
        found = np.percentile(np.asarray(record.group_seconds, np.float64), _QUANTILES)
        metrics |= {f"produce/group_seconds_p{q}": float(value) for q, value in zip(_QUANTILES, found, strict=True)}
    return metrics


def _engine(record: BatchRecord) -> Metrics:
    metrics: Metrics = {
        "engine/in_flight_mean": record.in_flight,
        "engine/in_flight_max": record.most_in_flight,
        "engine/busy": _rate(record.busy, record.period),
        "engine/tokens_per_second": _rate(record.tokens, record.busy),
    }
    if (use := record.engine) is not None:
        metrics |= {"engine/running_mean": use.running, "engine/waiting_mean": use.waiting, "engine/preemptions": use.preemptions}
    return metrics


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0


def batch_statistics(groups: Sequence[RolloutGroup], version: int | None) -> Metrics:
    """The metrics that tell of the groups alone; of their staleness only where the policy's version is known.

    Members that are left out of their group are counted, and have no part in the others.
    """
    members = [state for group in groups for state in group.rollouts]
    rollouts = [state for state in members if not state.left_out]
    stale = [] if version is None else [staleness for group in groups if (staleness := group.staleness(version)) is not None]
    reasons = Counter(state.finish_reason for state in rollouts)
    return {
        **_spread("batch/reward", [state.reward for state in rollouts if state.reward is not None]),
        **_spread("batch/score", [state.score for state in rollouts if state.score is not None]),
        **_spread("batch/response_tokens", [state.response_ids.size for state in rollouts]),
        **_spread("batch/staleness", stale),
        **_histogram("batch/staleness", stale, shown=version is not None),
        **_judged(rollouts),
        "batch/groups": len(groups),
        "batch/rollouts": len(members),
        "batch/left_out": len(members) - len(rollouts),
        "batch/truncated": reasons["length"] / max(1, len(rollouts)),
    }


def _judged(rollouts: Sequence[RolloutState]) -> Metrics:
    """What the functions of a `RewardSet` gave these rollouts, how long it took, and of how many they gave nothing."""
    parts, seconds, marks = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list), Counter[str]()
    for state in rollouts:
        for function, part in state.reward_parts.items():
            parts[function].append(part)
        for name, value in state.metrics.items():
            kind, _, function = name.partition("/")
            if kind == "reward_seconds":
                seconds[function].append(value)
            elif kind in _MARKS:
                marks[f"batch/{name}"] += 1
    found: Metrics = dict(marks)
    for what, by_function in (("part", parts), ("reward_seconds", seconds)):
        for function, values in by_function.items():
            found |= _spread(f"batch/{what}/{function}", values)
    return found


def _spread(name: str, values: Sequence[float]) -> Metrics:
    if not values:
        return {}
    array = np.asarray(values, np.float64)
    return {f"{name}_mean": float(array.mean()), f"{name}_std": float(array.std()), f"{name}_max": float(array.max())}


def _histogram(name: str, values: Sequence[int], *, shown: bool) -> Metrics:
    """How many there are of each value from 0 on; the large ones together. Negative ones count as 0."""
    if not shown:
        return {}
    counted = Counter(min(max(0, value), STALENESS_SHOWN) for value in values)
    found = {value: float(counted[value]) for value in range(STALENESS_SHOWN + 1)}
    return {f"{name}_{value}": found[value] for value in range(STALENESS_SHOWN)} | {f"{name}_{STALENESS_SHOWN}_up": found[STALENESS_SHOWN]}


class Books:
    """What is known of a task's production beyond one batch: the ledger, and the task's account at the last few batches."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self._accounts: deque[Account] = deque(maxlen=WINDOW + 1)

    @property
    def opened(self) -> bool:
        """Whether they have an account to count from."""
        return bool(self._accounts)

    def open(self, before: Account) -> None:
        """Count from this account, that of the task before its first batch."""
        self._accounts.append(before)

    def of_run(self, account: Account) -> Metrics:
        """Metrics of the run so far when a batch was handed out; `account` is as of then."""
        last, first = self._accounts[-1], self._accounts[0]
        self._accounts.append(account)
        wasted = {reason: n - last.wasted[reason] for reason, n in account.wasted.items()}
        biases = {
            "run/length_bias": account.length_bias,
            "run/coverage_bias": account.coverage_bias,
            "window/length_bias": length_bias(account.trained - first.trained, account.finished - first.finished),
        }
        return {
            "produce/wasted": sum(wasted.values()),
            "run/tokens_generated": account.generated,
            "run/tokens_trained": account.trained.tokens,
            "run/tokens_waiting": account.waiting.tokens,
            "run/tokens_wasted": sum(account.wasted.values()),
            **{f"run/wasted_{reason}": n for reason, n in account.wasted.items()},
            "run/overdue": account.overdue,
            **{name: bias for name, bias in biases.items() if bias is not None},
        }


def handing_out(account: Account, groups: Sequence[RolloutGroup]) -> Account:
    """The account when these groups, which wait in it, are handed out; its coverage stays as it was found."""
    amount = Amount.total(state.amount for group in groups for state in group.rollouts)
    trained = Amount(amount.finished_tokens, amount.finished, amount.finished_tokens)
    wasted = {**account.wasted, "left_out": account.wasted["left_out"] + amount.tokens - trained.tokens}
    return replace(account, trained=account.trained + trained, waiting=account.waiting - amount, wasted=wasted)
