"""The machine on PostgreSQL: there a process dies without a word, and its lease runs out; connections are dropped meanwhile."""

import asyncio
import os
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import rule

from tests import postgres
from tests.buffer.groups import url
from tests.buffer.model import commands
from tests.buffer.model.commands import Command
from tests.buffer.model.described import same
from tests.buffer.model.machine import BufferMachine, of_model, reopened
from tests.buffer.model.reference_copies import Model

_DROP = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"


class PostgresMachine(BufferMachine):
    """As `BufferMachine`, but for what is SQLite's own: what a kill leaves of a transaction is the server's affair."""

    def both(self, command: Command) -> None:
        if command.name not in ("draw", "draw_and_start"):
            super().both(command)
            return
        found, rows = self.run(self.of_buffer(command)), len(command.args[1])
        if isinstance(found, list) and rows:
            # What was rolled back leaves a gap in a sequence.
            (newest,) = self.run(self.buffer.query(order="newest", limit=1))
            assert newest.group_id - rows >= self.model.last_id
            self.model.last_id = newest.group_id - rows
        same(found, of_model(self.model, command), command.name)

    @rule(data=st.data(), n=st.integers(2, 5))
    def call_at_once(self, data: st.DataObject, n: int) -> None:
        """Connections are dropped meanwhile: each call is done, and done once."""
        self.world.ghosts = False
        todo = self.draw([maker for maker in commands.AT_ONCE if maker not in (commands.draw, commands.draw_and_start)], n, data)
        self.world.ghosts = True
        states = self.states(todo, at_once=True)
        self.run(self.while_connections_are_dropped(todo))
        self.world.model = states[-1]

    async def while_connections_are_dropped(self, todo: Sequence[Command]) -> list[Any]:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(asyncio.to_thread(postgres.execute, os.environ[postgres.ADDRESS], _DROP))
            return await self.all_of(todo)

    @rule(data=st.data(), n=st.integers(0, 4))
    def die(self, data: st.DataObject, n: int) -> None:
        for _ in range(n):
            for command in self.draw(commands.WRITING, 1, data):
                self.both(command)
        assert self.buffer._writer is not None
        self.buffer._writer._leave = None
        self.run(self.buffer.close())
        postgres.execute(url(self.folder), "UPDATE producers SET expires_at = 0")
        self.open()
        self.world.model = reopened(self.model)
        self.holds_all_of_it()

    def left_by_close(self) -> Model:
        left = self.model.copied()
        left.clock += 1
        left.closed()
        return left
