"""The rest of the reference: what it gives up, questions with filters, files, and copies of runs."""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from buffer import RolloutGroup, Status
from buffer.accounts import Account
from buffer.amounts import Amount
from buffer.codec import encode_group
from buffer.errors import DuplicateGroupError, IllegalTransitionError, StepError
from buffer.forking import ForkReport
from buffer.keeping import PruneReport
from buffer.queries import RecordedStep
from buffer.status import group_status, member_status
from tests.buffer.model.described import of_file
from tests.buffer.model.reference import LAST, Known, Reference

S = Status
GIVEN_UP = ("stale", "undone", "interrupted", "restarted")


class Model(Reference):
    """The whole of `ReplayBuffer`."""

    # -- questions --------------------------------------------------------------------------------------------------

    def query(self, *, order: str = "oldest", limit: int = 100, offset: int = 0, **filters: Any) -> list[RolloutGroup]:
        found = [known for known in self.groups.values() if all(_FILTERS[name](known, bound) for name, bound in filters.items())]
        found.sort(key=lambda known: (_ORDERS[order](self, known), known.group_id))
        return [self.load(known.group_id) for known in found[offset : offset + limit]]

    def recorded_steps(self, task_name: str) -> list[RecordedStep]:
        batches: dict[int, list[Known]] = {}
        for known in self.of_task(task_name, S.CONSUMED, S.ARCHIVED):
            batches.setdefault(known.step or 0, []).append(known)
        return [
            RecordedStep(step, self.steps.get(step), len(batch), sum(known.pruned for known in batch))
            for step, batch in sorted(batches.items())
        ]

    def account(self, task_name: str, *, window: int = 8) -> Account:
        gone = {why: self.given_up.get((task_name, why), Amount()) for why in (*GIVEN_UP, "left_out", "pruned")}
        final = [S.CONSUMED, S.ARCHIVED, S.FILTERED, S.FAILED, S.DISCARDED]
        amounts = {status: Amount.total(known.amount for known in self.of_task(task_name, status)) for status in S}
        trained = [
            known for known in self.of_task(task_name, S.CONSUMED, S.ARCHIVED) if (known.step or 0) <= self.last_step(task_name) - window
        ]
        by = max([known.group_id for known in trained if known.step == max(k.step or 0 for k in trained)], default=-1)
        then = Counter(known.status for known in self.of_task(task_name) if known.group_id <= by)
        waiting = sum(n for status, n in then.items() if status not in final)
        untrained = waiting + then[S.FAILED]
        pruned = self.pruned(task_name) if by >= 0 and task_name in self.tasks else 0
        handed_out = Amount.total([amounts[S.CONSUMED], amounts[S.ARCHIVED], gone["pruned"]])
        useless = {"left_out": gone["left_out"].tokens + handed_out.tokens - handed_out.finished_tokens}
        return Account(
            trained=Amount(handed_out.finished_tokens, handed_out.finished, handed_out.finished_tokens),
            waiting=Amount.total(amount for status, amount in amounts.items() if status not in final),
            wasted={why: gone[why].tokens for why in GIVEN_UP} | useless | {s.value: amounts[s].tokens for s in final[2:]},
            finished=Amount.total([*amounts.values(), *gone.values()]),
            overdue=waiting,
            cohort=untrained + then[S.CONSUMED] + then[S.ARCHIVED] + pruned,
            untrained=untrained,
            window=window,
        )

    def drawn(self, task_name: str) -> int:
        return self.tasks[task_name].drawn

    def pruned(self, task_name: str) -> int:
        return self.tasks[task_name].pruned

    def pruned_to(self) -> int:
        return self.rows_pruned_to

    # -- keeping less -----------------------------------------------------------------------------------------------

    def prune(
        self, *, keep_steps: int | None = None, keep_last: int | None = None, max_bytes: int | None = None, rows: bool = False
    ) -> PruneReport:
        whole = [known for known in self.groups.values() if known.status is S.ARCHIVED and not known.pruned]
        newest = sorted(whole, key=lambda known: -(known.place or 0))
        gone: dict[int, int] = {}
        room = 0
        for n, known in enumerate(newest):
            size = encode_group(self.load(known.group_id)).group["payload_bytes"]
            room += size
            too_old = keep_steps is not None and (known.step or 0) <= (self.committed or 0) - keep_steps
            too_many = keep_last is not None and n >= keep_last
            if too_old or too_many or (max_bytes is not None and room > max_bytes):
                gone[known.group_id] = size
        for group_id in gone:
            self.forget_payload(self.groups[group_id])
        dropped = self.drop_rows() if rows else 0
        return PruneReport(len(gone), sum(gone.values()), dropped)

    def forget_payload(self, known: Known) -> None:
        known.lengths_before = tuple(member.response_ids.size for member in known.members)
        for index, member in enumerate(known.members):
            kept = member.detached()
            kept.reset()
            kept.prompt_ids = None
            kept.finish_reason, kept.score, kept.reward = member.finish_reason, member.score, member.reward
            known.members[index] = kept
        known.pruned = True

    def drop_rows(self) -> int:
        last = Counter[str]()
        for known in self.groups.values():
            if known.status is S.ARCHIVED:
                last[known.task] = max(last[known.task], known.step or 0)
        gone = [known for known in self.groups.values() if known.pruned and (known.step or 0) < last[known.task]]
        for known in gone:
            del self.groups[known.group_id]
            self.tasks[known.task].pruned += 1
            self.add_given_up(known.task, "pruned", known.amount)
            self.rows_pruned_to = max(self.rows_pruned_to, known.step or 0)
        return len(gone)

    # -- files ------------------------------------------------------------------------------------------------------

    def exported(self, task_name: str | None, status: Collection[Status]) -> list[RolloutGroup]:
        """What a file holds, in its order."""
        found = [
            known
            for known in self.groups.values()
            if not known.pruned and task_name in (None, known.task) and (not status or known.status in status)
        ]
        found.sort(key=lambda known: (LAST if known.place is None else known.place, known.ready))
        return [self.load(known.group_id) for known in found]

    def import_file(self, groups: Sequence[RolloutGroup]) -> int:
        """`groups` are those of the file."""
        groups = [_settled(group) for group in groups]
        for group in groups:
            if group.group_id in self.groups and of_file(_settled(self.load(group.group_id))) != of_file(group):
                raise DuplicateGroupError
        new = [group for group in groups if group.group_id not in self.groups]
        self.refuse_positions(new)
        self.restore(new)
        return len(new)

    def put_restored(self, groups: Sequence[RolloutGroup]) -> None:
        if any(group.group_id in self.groups for group in groups):
            raise DuplicateGroupError
        for group in groups:
            if group.status is S.RUNNING or (group.consumed_step is None) == (group.status in (S.CONSUMED, S.ARCHIVED)):
                raise IllegalTransitionError
        self.refuse_steps(groups)
        self.refuse_positions(groups)
        if len({group.group_id for group in groups}) < len(groups):
            raise DuplicateGroupError
        self.restore(groups)

    def refuse_steps(self, groups: Sequence[RolloutGroup]) -> tuple[int | None, int | None]:
        """The last archived and the first consumed step of `groups`, if they go with ours."""
        archived = max((g.consumed_step or 0 for g in groups if g.status is S.ARCHIVED), default=None)
        consumed = min((g.consumed_step or 0 for g in groups if g.status is S.CONSUMED), default=None)
        ours = min((known.step or 0 for known in self.groups.values() if known.status is S.CONSUMED), default=LAST)
        final = max(self.committed or 0, archived or 0)
        if (archived is not None and ours <= archived) or (consumed is not None and consumed <= final):
            raise StepError
        return archived, consumed

    def restore(self, groups: Sequence[RolloutGroup]) -> None:
        archived, consumed = self.refuse_steps(groups)
        for group in groups:
            known = self.add(group)
            if group.consumed_step is not None:
                self.place += 1
                known.step, known.place = group.consumed_step, self.place
        if archived is not None and archived > (self.committed or 0):
            self.committed = archived
        self.needs_resume |= consumed is not None

    # -- copies -----------------------------------------------------------------------------------------------------

    def fork(self, step: int) -> tuple[ForkReport, "Model"]:
        """The report, and the new run."""
        if step < max([self.rows_pruned_to, *(known.step or 0 for known in self.groups.values() if known.pruned)]):
            raise StepError
        other: Model = self.copied()  # type: ignore[assignment]  # a copy is of the same class
        running = other.running()
        other.interrupt(running)
        for known in other.groups.values():
            if known.status is S.ARCHIVED and (known.step or 0) > step:
                other.note(known, S.CONSUMED, reason=f"the run was forked at step {step}")
        other.committed = None if self.committed is None else min(self.committed, step)
        other.told = None if self.told is None or self.told[1] > step else self.told
        report = other.resume(step)
        other.reopened()
        return ForkReport(len(other.groups), step, report.version, report.rewound, len(running)), other


def _settled(group: RolloutGroup) -> RolloutGroup:
    """What ran elsewhere is interrupted where nobody runs it."""
    members = [rollout.detached() for rollout in group.rollouts]
    for member in members:
        member.status = S.INTERRUPTED if member.status is S.RUNNING else member.status
    whole = group_status([member.status for member in members])
    for member in members:
        member.status = member_status(whole, member.status)
    return RolloutGroup(group.group_id, members, group.task_name, group.position, group.consumed_step, group.filter_reason)


def _mean_reward(known: Known) -> float | None:
    rewards = [member.reward for member in known.members if member.reward is not None]
    return sum(rewards) / len(rewards) if rewards else None


_FILTERS: dict[str, Any] = {
    "task_name": lambda known, name: known.task == name,
    "status": lambda known, statuses: not statuses or known.status in statuses,
    "step": lambda known, step: known.step == step,
    "min_version": lambda known, bound: known.versions is not None and known.versions[0] >= bound,
    "max_version": lambda known, bound: known.versions is not None and known.versions[1] <= bound,
    "min_reward": lambda known, bound: (mean := _mean_reward(known)) is not None and mean >= bound,
    "max_reward": lambda known, bound: (mean := _mean_reward(known)) is not None and mean <= bound,
    "error": lambda known, text: any(m.error is not None and text.lower() in m.error.lower() for m in known.members),
    "min_attempts": lambda known, bound: any(m.attempts >= bound for m in known.members),
    "min_age": lambda known, seconds: seconds <= 0,
    "max_age": lambda known, seconds: seconds > 0,
}
"""Ages: every group of a test was drawn moments ago."""

_ORDERS: dict[str, Any] = {
    "oldest": lambda model, known: 0,
    "newest": lambda model, known: -known.group_id,
    "changed": lambda model, known: -known.changed,
    "stalest": lambda model, known: model.oldest(known),
    "best": lambda model, known: LAST if (mean := _mean_reward(known)) is None else -mean,
    "worst": lambda model, known: LAST if (mean := _mean_reward(known)) is None else mean,
}
