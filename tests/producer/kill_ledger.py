"""The ledger of a run that is killed again and again: what its processes said, held against the database and the checkpoint."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

from buffer import ReplayBuffer, RolloutGroup, Status
from buffer.errors import DatabaseError
from producer.shares import Allotment, allot
from tests.producer.kill_plan import Plan
from tests.producer.kill_told import members

Rollout = tuple[int, int]
"""(group_id, index)"""

Row = tuple[int, int, int]
"""(epoch, offset, answer): where a prompt stands in its task's stream, and which row it is."""

DONE = (Status.COMPLETED, Status.CONSUMED, Status.ARCHIVED)


@dataclass(frozen=True)
class Member:
    """A rollout as it was stored."""

    status: str
    tokens: int
    digest: int
    oldest: int
    newest: int

    @property
    def done(self) -> bool:
        """Whether it must never be generated again."""
        return self.status in DONE


@dataclass
class Ledger:
    """What is known to be durable, from what was acknowledged and from looking after each kill.

    Attributes:
        plan: of the run.
        order: by task the rows in the order in which a run without kills draws them.
        drawn: by task the groups in the order of their draws.
        stored: members as they were last stored.
        storing: by group what was asked to be stored of it and not acknowledged, in order: it may have happened or not.
        taken: by (step, task) the groups of the batch in the order they were handed out; unless it is final it comes again.
        seen: the same, of takes that were not acknowledged and happened all the same.
        live: batches that are consumed now.
        undone: those with tokens of weights that the present process's rewind undid.
        expiring: by task the version that stale groups were last looked for with, in this process.
        ever_undone: whether there ever were any.
        updating: the step behind which the weights were being updated when the last process was killed.
        running, rewound, checkpoint: groups that run, groups consumed after the checkpoint, its step; all at the last look.
        said: how often each act was.
    """

    plan: Plan
    order: dict[str, list[Row]]
    drawn: dict[str, list[int]] = field(default_factory=dict)
    stored: dict[Rollout, Member] = field(default_factory=dict)
    storing: dict[int, list[str]] = field(default_factory=dict)
    taken: dict[tuple[int, str], list[int]] = field(default_factory=dict)
    seen: dict[tuple[int, str], set[int]] = field(default_factory=dict)
    live: set[tuple[int, str]] = field(default_factory=set)
    undone: set[Rollout] = field(default_factory=set)
    expiring: dict[str, int] = field(default_factory=dict)
    running: int = 0
    rewound: int = 0
    checkpoint: int = 0
    committing: int = 0
    committed: int = 0
    ever_undone: bool = False
    updating: int | None = None
    opened: bool = False
    said: Counter[str] = field(default_factory=Counter)

    # -- what a process said ------------------------------------------------------------------------------------

    def read(self, lines: list[dict[str, Any]]) -> None:
        """Enter what one process said, each line checked against all before it."""
        self.expiring.clear()
        for line in lines:
            self.said[line["what"]] += 1
            if enter := getattr(self, f"_{line['what']}", None):
                enter(line)

    def _error(self, line: dict[str, Any]) -> None:
        raise AssertionError(line["trace"])

    def _resuming(self, line: dict[str, Any]) -> None:
        assert line["step"] == self.checkpoint
        self.live = {batch for batch in self.live if batch[0] <= line["step"]}
        self.undone = {rollout for rollout, member in self.stored.items() if member.newest > line["step"]}
        self.ever_undone |= bool(self.undone)

    def _resumed(self, line: dict[str, Any]) -> None:
        self.opened = True
        if self.updating is not None:
            self.said["rewound behind half an update"] += self.updating > line["step"] and line["rewound"] > 0
            self.updating = None
        assert line["version"] == line["step"], "one update of the weights a step"
        assert line["rewound"] == self.rewound, "what was consumed after the checkpoint is given back, and nothing else"
        assert line["released"] == self.running, "what ran when the process was killed is interrupted, and nothing else"

    def _drawn(self, line: dict[str, Any]) -> None:
        drawn = self.drawn.setdefault(line["task"], [])
        rows = self.order[line["task"]][len(drawn) : len(drawn) + len(line["groups"])]
        assert [tuple(row) for row in line["rows"]] == rows, "fresh draws go on where a run without kills would have"
        drawn += line["groups"]

    def _generating(self, line: dict[str, Any]) -> None:
        rollout = _rollout(line)
        if (member := self.stored.get(rollout)) is None:
            assert line["tokens"] == 0
        elif not self._may_have_expired(rollout):
            assert not member.done, f"rollout {rollout} is completed and generated again"
            assert line["tokens"] == member.tokens, f"rollout {rollout} goes on from what was stored of it"

    def _judging(self, line: dict[str, Any]) -> None:
        rollout = _rollout(line)
        assert rollout not in self.stored or not self.stored[rollout].done or self._may_have_expired(rollout), "what is judged stays so"

    def _storing(self, line: dict[str, Any]) -> None:
        self.storing.setdefault(line["group"], []).append(line["what"])

    _checkpointing = _storing

    def _stored(self, line: dict[str, Any]) -> None:
        asked = self.storing[line["group"]]
        del asked[: asked.index("storing") + 1]  # checkpoints asked for before it are done too
        self._hold(line)

    def _checkpointed(self, line: dict[str, Any]) -> None:
        asked = self.storing[line["group"]]
        if "checkpointing" in asked:  # else it was told late, and more was stored behind it
            asked.remove("checkpointing")
            self._hold(line)

    def _hold(self, line: dict[str, Any]) -> None:
        for index, values in enumerate(line["members"]):
            self.stored[line["group"], index] = Member(*values)
            self.undone.discard((line["group"], index))

    def _taken(self, line: dict[str, Any]) -> None:
        batch, groups = (line["step"], line["task"]), line["groups"]
        if not groups:  # it was not whole any more: some had become too stale since it was found whole
            return
        assert batch not in self.live, "a step's batch is taken once"
        assert not set(groups) & self._live_groups(), "no group is in two batches"
        assert all(member.done for group in groups for member in self._members(group)), "what is trained on is completed"
        if not self._expires():
            assert groups == self.taken.get(batch, groups), f"batch {batch} comes again as it was"
            assert set(groups) == self.seen.get(batch, set(groups)), f"batch {batch} comes again as it was"
        self.taken[batch] = groups
        self.live.add(batch)

    def _handed(self, line: dict[str, Any]) -> None:
        bound = self.plan.max_staleness
        assert bound is None or all(own is None or own <= bound for own in line["staleness"]), f"{line} exceeds the bound"

    def _updating(self, line: dict[str, Any]) -> None:
        self.updating = line["step"]

    def _updated(self, line: dict[str, Any]) -> None:
        self.updating = None

    def _expiring(self, line: dict[str, Any]) -> None:
        self.expiring[line["task"]] = line["version"]

    def _expired(self, line: dict[str, Any]) -> None:
        if self.plan.waits and self.plan.way != "manager" and not self.ever_undone:
            assert line["n"] == 0, "what is waited for never gets too stale, where no weights were undone"

    def _committing(self, line: dict[str, Any]) -> None:
        self.committing = line["step"]

    def _committed(self, line: dict[str, Any]) -> None:
        self.committed = line["step"]

    # -- what the database says ---------------------------------------------------------------------------------

    async def look(self) -> None:
        """Hold the ledger against the database as the kill left it, without writing; then against the checkpoint."""
        try:
            async with ReplayBuffer.open(self.plan.url, read_only=True) as buffer:
                report, groups = await buffer.audit(), await buffer.query(limit=100_000)
        except DatabaseError:
            assert not self.opened, "only a database that nobody was told of can be missing or empty"
            return
        assert report.ok, report.problems
        self._check_draws(groups)
        stored = {group.group_id: group for group in groups}
        self._check_members(stored)
        self._check_batches(stored)
        self.checkpoint = len(self.trained())
        self._check_commits(groups)
        self.running = sum(group.status is Status.RUNNING for group in groups)
        self.rewound = sum(group.status is Status.CONSUMED and (group.consumed_step or 0) > self.checkpoint for group in groups)

    def _check_draws(self, groups: list[RolloutGroup]) -> None:
        found: dict[str, list[int]] = {task.name: [] for task in self.plan.tasks}
        rows: dict[str, list[Row]] = {task.name: [] for task in self.plan.tasks}
        for group in sorted(groups, key=lambda group: group.group_id):
            assert group.position is not None
            found[group.task_name].append(group.group_id)
            rows[group.task_name].append((*group.position, group.rollouts[0].row["answer"]))
        for task, acknowledged in self.drawn.items():
            assert found[task][: len(acknowledged)] == acknowledged, "what was drawn is the group that it was"
        for task, drawn in rows.items():
            assert drawn == self.order[task][: len(drawn)], "each prompt is in one group, none is skipped, the order is that of the dataset"
        self._check_ahead(groups)
        self.drawn = found  # a draw that was killed before it was acknowledged may have happened or not

    def _check_ahead(self, groups: list[RolloutGroup]) -> None:
        """What is drawn ahead to choose among is chosen among by the next process too; it does not draw as many more."""
        if self.plan.order is None or self.plan.over_issue is None:
            return
        for task in self.plan.tasks:
            at_once = ceil((1 + self.plan.over_issue) * (self.plan.total if self.plan.way == "manager" else task.batch_size))
            waiting = sum(group.status is Status.PENDING and group.task_name == task.name for group in groups)
            assert waiting <= 2 * at_once + 5, "a process chooses among what the one before it drew ahead"

    def _check_members(self, stored: dict[int, RolloutGroup]) -> None:
        for (group_id, index), member in self.stored.items():
            now = Member(*members(stored[group_id])[index])
            if self._may_have_expired((group_id, index)):
                continue
            assert now.done >= member.done, f"rollout {(group_id, index)} was completed and is {now.status}"
            if member.done or not self.storing.get(group_id):
                assert (now.tokens, now.digest) == (member.tokens, member.digest), f"rollout {(group_id, index)} is as it was stored"
        self.storing.clear()
        self.undone.clear()
        for group_id, group in stored.items():
            for index, values in enumerate(members(group)):
                self.stored[group_id, index] = Member(*values)

    def _check_batches(self, stored: dict[int, RolloutGroup]) -> None:
        for step, task in self.live:
            for group_id in self.taken[step, task]:
                group = stored[group_id]
                assert group.status in (Status.CONSUMED, Status.ARCHIVED), f"group {group_id} of step {step} is {group.status}"
                assert group.consumed_step == step
        consumed: dict[tuple[int, str], list[int]] = {}
        for group_id, group in stored.items():
            if group.consumed_step is not None:
                consumed.setdefault((group.consumed_step, group.task_name), []).append(group_id)
        for batch, groups in consumed.items():
            assert len(groups) == self._batch_size(*batch), "a batch is taken whole"
            if batch in self.live:
                assert set(groups) == set(self.taken[batch])
            else:
                # Taken, and killed before it was told. It comes again too.
                self.seen[batch] = set(groups)
        if self.plan.way == "manager":
            steps = Counter(step for step, _ in consumed)
            assert all(n == len([share for share in self._shares(step).values() if share]) for step, n in steps.items()), "all or none"

    def _check_commits(self, groups: list[RolloutGroup]) -> None:
        archived = max((group.consumed_step or 0 for group in groups if group.status is Status.ARCHIVED), default=0)
        assert archived <= self.committing, "only what was committed is final"
        final = [group for group in groups if group.consumed_step is not None and group.consumed_step <= self.committed]
        assert all(group.status is Status.ARCHIVED for group in final), "what was committed is final"
        assert archived <= self.checkpoint, "nothing is final that no checkpoint holds"
        trained = [(step, group) for step, batches in self.trained().items() for batch in batches.values() for group, *_ in batch]
        at = {group.group_id: group.consumed_step for group in groups}
        assert all(at[group] == int(step) for step, group in trained), "what the checkpoint was trained on is consumed at its step"

    # -- the whole run ------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """After the run's own end: everything is accounted for."""
        await self.look()
        trained = self.trained()
        assert list(map(int, trained)) == list(range(1, self.plan.steps + 1))
        groups = [group for batches in trained.values() for batch in batches.values() for group, *_ in batch]
        assert len(groups) == len(set(groups)) == self.plan.steps * sum(task.batch_size for task in self.plan.tasks), (
            "none is trained on twice"
        )
        assert self.running == 0
        assert self.committed == self.plan.steps
        for task in self.plan.tasks:
            self._check_epochs(self.order[task.name][: len(self.drawn[task.name])], task.size)

    def _check_epochs(self, rows: list[Row], size: int) -> None:
        for start in range(0, len(rows) - size + 1, size):
            epoch = rows[start : start + size]
            assert {number for number, *_ in epoch} == {start // size}
            assert sorted(answer for *_, answer in epoch) == list(range(size)), "every epoch holds every row once"

    def trained(self) -> dict[str, dict[str, Any]]:
        """What the checkpoint holds: by step and task the batch, each group with a digest of its responses."""
        path = Path(self.plan.folder) / "checkpoint.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    # -- inside -------------------------------------------------------------------------------------------------

    def _live_groups(self) -> set[int]:
        return {group for batch in self.live for group in self.taken[batch]}

    def _members(self, group_id: int) -> list[Member]:
        return [self.stored[group_id, index] for index in range(self.plan.members)]

    def _batch_size(self, step: int, task_name: str) -> int:
        if self.plan.way == "manager":
            return self._shares(step)[task_name]
        return next(task.batch_size for task in self.plan.tasks if task.name == task_name)

    def _shares(self, step: int) -> Mapping[str, int]:
        """How the batch of a step is shared out in a run without kills."""
        allotment = Allotment({}, {})
        for _ in range(step):
            allotment = allot(self.plan.total, self.plan.weights, allotment.carried)
        return allotment.groups

    def _expires(self) -> bool:
        return self.plan.max_staleness is not None or self.plan.future == "expire"

    def _may_have_expired(self, rollout: Rollout) -> bool:
        """Whether this process may have found it too stale, or rewound its weights."""
        if rollout in self.undone and self._expires():
            return True
        bound = self.plan.max_staleness
        return bound is not None and any(version - self.stored[rollout].oldest > bound for version in self.expiring.values())


def _rollout(line: dict[str, Any]) -> Rollout:
    group_id, index = line["rollout"]
    return group_id, index
