"""Batches of several tasks: taken together, and how they were shared out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from buffer import arguments as args
from buffer import operations, queries
from buffer.access import Access
from buffer.operations import Take, TakeTogether
from buffer.policies import Fifo, TakePolicy
from buffer.rollout import RolloutGroup


@dataclass(frozen=True, slots=True)
class Share:
    """A task's part of a batch.

    Attributes:
        task_name: whose.
        weight: among the tasks of the batch.
        groups: of the batch.
        carried: groups that the task is owed after it.
    """

    task_name: str
    weight: float
    groups: int
    carried: float


class Sharing(Access):
    """How a `ReplayBuffer` hands out batches of several tasks."""

    async def take_together(
        self,
        shares: Sequence[Share],
        *,
        step: int,
        version: int | None = None,
        policies: Mapping[str, TakePolicy] | None = None,
        oldest_versions: Mapping[str, int] | None = None,
    ) -> dict[str, list[RolloutGroup]]:
        """A batch of several tasks: as many completed groups of each as its share says, all consumed at `step`, or none of any.

        How it was shared out is written down in the same transaction, see `shares`.

        Args:
            shares: one a task.
            step: of the trainer; it must lie behind the last committed one.
            version: of the policy now, kept for `resume`.
            policies: by task which groups first, see `take`.
            oldest_versions: by task no groups older than this, see `take`; those of a task that is left out may be of any age.

        Returns:
            The groups by task; nothing where too few of some task are completed. Then nothing was changed.

        Raises:
            ResumeRequiredError, StepError: as of `take`.
        """
        step, by_task = args.step_number(step), {share.task_name: share for share in shares}
        if len(by_task) < len(shares) or not sum(args.whole_number("groups", share.groups, at_least=0) for share in shares):
            raise ValueError(f"shares={list(shares)} make no batch; give one share a task, and one group or more in all")
        self._check_open()
        self._check_resumed()
        version = args.whole_or_none("version", version)
        takes = [
            self._part(share, step, version, (policies or {}).get(share.task_name), (oldest_versions or {}).get(share.task_name))
            for share in shares
            if share.groups
        ]
        request = TakeTogether(step, version, takes, [asdict(share) for share in shares])
        groups = await self._hand_out(operations.take_together, request, operations.give_back)
        taken: dict[str, list[RolloutGroup]] = {share.task_name: [] for share in shares} if groups else {}
        for group in groups:
            taken[group.task_name].append(group)
        return taken

    def _part(self, share: Share, step: int, version: int | None, policy: TakePolicy | None, oldest_version: int | None) -> Take:
        args.require_task(share.task_name)
        args.check_policy(policy)
        return Take(share.task_name, share.groups, step, version, policy or Fifo(), args.bound_or_none("oldest_version", oldest_version))

    async def shares(self, *, before: int) -> list[Share]:
        """How the last batch of several tasks before the step `before` was shared out; nothing where there was none."""
        rows = await self._read(queries.shares_before, args.whole_number("before", before, at_least=0))
        return [Share(row.task_name, row.weight, row.groups, row.carried) for row in rows]

    async def shared_tasks(self) -> list[str]:
        """The tasks that ever had a share of a batch."""
        return await self._read(queries.shared_tasks)
