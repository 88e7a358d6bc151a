"""`SurplusStop`: stops the redundant members of a group when enough of their siblings have completed."""

import asyncio

from agent_loop import AgentLoop
from agent_loop.errors import first_error
from buffer import RolloutGroup, Status
from producer.members import RedundantMembers


class SurplusStop:
    """Runs one group until enough members have completed, and leaves the others out.

    Args:
        agent_loop: runs it.
        group: as it was claimed.
        redundant: how many are enough.
    """

    def __init__(self, agent_loop: AgentLoop, group: RolloutGroup, redundant: RedundantMembers) -> None:
        self._agent_loop, self._group, self._redundant = agent_loop, group, redundant
        # One that was left out stays so when its siblings run again, having expired: it is not among those that are enough.
        self._completed = [state.index for state in group.rollouts if state.status is Status.COMPLETED and not state.left_out]
        self._enough = asyncio.Event()
        self._look()

    def ended(self, member: int) -> None:
        """A member ended."""
        if self._group.rollouts[member].status is Status.COMPLETED:
            self._completed.append(member)
            self._look()

    def _look(self) -> None:
        if self._redundant.surplus(self._completed, len(self._group.rollouts)):
            self._enough.set()

    async def generate_group(self) -> RolloutGroup:
        """As of the agent loop; when it returns, what is not needed is left out."""
        try:
            async with asyncio.TaskGroup() as tasks:
                stopping = tasks.create_task(self._stop())
                try:
                    returned = await self._agent_loop.generate_group(self._group)
                finally:
                    stopping.cancel()
        except BaseExceptionGroup as errors:
            error = first_error(errors)
            raise error from error.__cause__
        if isinstance(returned, RolloutGroup):  # else the runner says what is wrong with it
            self._redundant.leave_out(returned, self._completed)
        return returned

    async def _stop(self) -> None:
        await self._enough.wait()
        await self._agent_loop.interrupt([self._group.group_id])
