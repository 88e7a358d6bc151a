"""What a long run leaves behind in PostgreSQL: rows that are dead, and the sizes of the tables, while groups live their lives.

    python -m benchmarks.bench_postgres_bloat --seconds 120

One process draws, runs, stores, takes and commits batches, and prunes all but the last 20 steps, as fast as it can. The tables
should come to a size and stay there: what is dead is cleaned up, and its room used again.
"""

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

from buffer import DrawnRow, Position, ReplayBuffer, RolloutGroup, Status
from tests import postgres

BATCH, MEMBERS, TOKENS, KEEP = 32, 4, 256, 20

_SIZES = """SELECT relname, pg_total_relation_size(relid) / 1024.0 / 1024.0, n_live_tup, n_dead_tup FROM pg_stat_user_tables
    WHERE schemaname = current_schema() AND relname IN ('groups', 'rollouts', 'payloads', 'counts', 'producers') ORDER BY relname"""


def finish(group: RolloutGroup, version: int) -> RolloutGroup:
    """What an agent loop would make of it."""
    for rollout in group.rollouts:
        rollout.append(range(TOKENS), logprobs=[-0.5] * TOKENS, version=version)
        rollout.status, rollout.finish_reason, rollout.score, rollout.reward = Status.COMPLETED, "stop", 1.0, 1.0
    return group


async def step(buffer: ReplayBuffer, number: int) -> None:
    """One batch from its prompts to its commit; every tenth prunes."""
    first = (number - 1) * BATCH
    rows = [DrawnRow({"prompt": "p"}, Position(0, first + n)) for n in range(BATCH)]
    ids = await buffer.draw("bench", rows, group_size=MEMBERS, moves=number - 1, cursor={"offset": first + BATCH})
    groups = await buffer.start(ids)
    async with asyncio.TaskGroup() as tasks:
        for group in groups:
            tasks.create_task(buffer.put(finish(group, number)))
    await buffer.take("bench", BATCH, step=number, version=number)
    await buffer.commit(number, version=number)
    if number % 10 == 0:
        await buffer.prune(keep_steps=KEEP, rows=True)


async def live(address: str, seconds: float, looks: int) -> None:
    """Print the tables' sizes `looks` times over so many seconds."""
    names = [str(row[0]) for row in postgres.execute(address, _SIZES)]
    print(f"| groups so far | {' | '.join(f'`{name}`: MiB, live, dead' for name in names)} |\n|{' --- |' * (1 + len(names))}")
    began, number = time.monotonic(), 0
    async with ReplayBuffer.open(address) as buffer:
        for look in range(1, looks + 1):
            while time.monotonic() - began < seconds * look / looks:
                number += 1
                await step(buffer, number)
            found = await asyncio.to_thread(postgres.execute, address, _SIZES)
            cells = " | ".join(f"{float(size):.1f}, {alive}, {dead}" for _, size, alive, dead in found)
            print(f"| {number * BATCH} | {cells} |", flush=True)


def main() -> None:
    """Start a server, live on it, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--looks", type=int, default=6)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="millrace-") as folder:
        server = postgres.Server(Path(folder) / "data")
        try:
            address = postgres.schema_url(server.address, Path(folder), "bloat")
            asyncio.run(prepared(address))
            asyncio.run(live(address, given.seconds, given.looks))
        finally:
            server.stop()


async def prepared(address: str) -> None:
    """The tables are made."""
    async with ReplayBuffer.open(address):
        pass


if __name__ == "__main__":
    main()
