"""`CallOffs`: waits that an interruption ends early: a slow judge, the pause before another attempt."""

import asyncio
from collections.abc import Awaitable, Collection
from typing import TypeVar, cast

T = TypeVar("T")


class CalledOffError(Exception):
    """What was waited for is not wanted any more; its rollout is interrupted."""


class CallOffs:
    """Knows who waits, by group; looking at those of one group does not cost more where thousands of others wait."""

    def __init__(self) -> None:
        self._waiting: dict[int, set[asyncio.Task[None]]] = {}
        self._called_off: set[asyncio.Task[None]] = set()

    async def unless_called_off(self, group_id: int, awaited: Awaitable[T]) -> T:
        """The result of `awaited`, which is cancelled by `call_off`.

        Raises:
            CalledOffError: it was called off.
        """
        task = cast("asyncio.Task[None]", asyncio.current_task())
        waiting = self._waiting.setdefault(group_id, set())
        waiting.add(task)
        try:
            return await awaited
        except asyncio.CancelledError:
            # One more cancellation than ours is its owner's, which must reach it.
            if task in self._called_off and task.uncancel() == 0:
                raise CalledOffError from None
            raise
        finally:
            waiting.discard(task)
            if not waiting:
                self._waiting.pop(group_id, None)
            self._called_off.discard(task)

    def call_off(self, group_ids: Collection[int]) -> None:
        """End the waits of these groups."""
        for task in [task for group_id in group_ids for task in self._waiting.get(group_id, ())]:
            if task not in self._called_off:
                self._called_off.add(task)
                task.cancel()
