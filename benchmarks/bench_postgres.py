"""PostgreSQL: puts from 32 producers against raw psycopg of the same bytes, and claims of 64 by four processes.

Run with `python -m benchmarks.bench_postgres`. A server of its own is started in a temporary folder, with its usual settings.
"""

import asyncio
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

import psycopg

from buffer import DrawnRow, Position, ReplayBuffer, RolloutGroup, RolloutState, Status
from buffer.codec import encode, snapshot
from tests import postgres

PRODUCERS, GROUPS, MEMBERS, TOKENS, ROUNDS = 32, 640, 8, 1024, 5
CLAIMS, CLAIMERS, AT_ONCE = 20_000, 4, 64


def a_group(group_id: int) -> RolloutGroup:
    rollouts = [RolloutState(group_id, index, "bench", row={"prompt": "p"}, prompt="p") for index in range(MEMBERS)]
    for rollout in rollouts:
        rollout.append(range(TOKENS), logprobs=[-0.5] * TOKENS, version=1)
        rollout.status, rollout.finish_reason, rollout.reward, rollout.score = Status.COMPLETED, "stop", 1.0, 1.0
    return RolloutGroup(group_id, rollouts, "bench")


async def puts(address: str, first: int) -> float:
    """Groups a second, each producer waiting for its put."""
    groups = [a_group(first + n) for n in range(GROUPS)]
    async with ReplayBuffer.open(address) as buffer:

        async def produce(mine: list[RolloutGroup]) -> None:
            for group in mine:
                await buffer.put(group)

        start = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for n in range(PRODUCERS):
                tasks.create_task(produce(groups[n::PRODUCERS]))
        return GROUPS / (time.perf_counter() - start)


def raw(address: str, first: int) -> float:
    """Groups a second of the same payloads, 32 in a transaction, in a table with nothing else."""
    payload = encode(snapshot(a_group(1))).arrays
    with psycopg.connect(address) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS raw (group_id bigint PRIMARY KEY, arrays bytea NOT NULL)")
        connection.execute("ALTER TABLE raw ALTER COLUMN arrays SET STORAGE EXTERNAL")
        connection.commit()
        start = time.perf_counter()
        for batch in range(0, GROUPS, PRODUCERS):
            rows = [(first + batch + n, payload) for n in range(PRODUCERS)]
            connection.cursor().executemany("INSERT INTO raw VALUES (%s, %s)", rows)
            connection.commit()
        return GROUPS / (time.perf_counter() - start)


CLAIMER = f"""
import asyncio, sys
from buffer import ReplayBuffer, Status
async def main(address):
    async with ReplayBuffer.open(address) as buffer:
        print("open", flush=True)
        sys.stdin.readline()
        while groups := await buffer.claim("claims", {AT_ONCE}, statuses=[Status.PENDING]):
            print(*(group.group_id for group in groups), flush=True)
        print("end", flush=True)
        sys.stdin.readline()
asyncio.run(main(sys.argv[1]))
"""


async def draw(address: str) -> None:
    async with ReplayBuffer.open(address) as buffer:
        for moves, first in enumerate(range(0, CLAIMS, 1000)):
            rows = [DrawnRow({"prompt": "p"}, Position(0, first + n)) for n in range(1000)]
            await buffer.draw("claims", rows, group_size=1, moves=moves, cursor={"offset": first + 1000})


def claims(address: str) -> tuple[float, int, int]:
    """Claims a second by all processes together, how many groups were claimed, and how many of them twice."""
    asyncio.run(draw(address))
    command, pipe = [sys.executable, "-c", CLAIMER, address], subprocess.PIPE
    claimers = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(CLAIMERS)]
    for claimer in claimers:
        assert claimer.stdout is not None
        assert claimer.stdout.readline() == "open\n"
    start = time.perf_counter()
    for claimer in claimers:
        assert claimer.stdin is not None
        claimer.stdin.write("go\n")
        claimer.stdin.flush()
    claimed: Counter[int] = Counter()
    for claimer in claimers:
        assert claimer.stdout is not None
        for line in iter(claimer.stdout.readline, "end\n"):
            claimed.update(map(int, line.split()))
    seconds = time.perf_counter() - start
    for claimer in claimers:
        claimer.communicate("end\n")
    return claimed.total() / AT_ONCE / seconds, len(claimed), sum(n - 1 for n in claimed.values())


def bloat(address: str) -> list[tuple[str, int, int, int]]:
    """Table, bytes of its rows, live and dead rows."""
    sizes = """SELECT relname, pg_relation_size(relid), n_live_tup, n_dead_tup FROM pg_stat_user_tables
        WHERE schemaname = current_schema() AND relname IN ('groups', 'counts', 'producers') ORDER BY relname"""
    return [(str(name), int(size), int(live), int(dead)) for name, size, live, dead in postgres.execute(address, sizes)]


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="millrace-") as folder:
        server = postgres.Server(Path(folder) / "data")
        try:
            postgres.execute(server.address, "ALTER SYSTEM RESET fsync", "SELECT pg_reload_conf()")
            report(postgres.schema_url(server.address, Path(folder), "bench"))
        finally:
            server.stop()


def report(address: str) -> None:
    ratios, controls = [], []
    first = 1_000_000
    asyncio.run(puts(address, first))  # not counted; and the buffer makes its tables only where there are no others yet
    for _ in range(ROUNDS):
        found: dict[str, float] = {}
        for what in random.sample(["puts", "raw", "control"], 3):
            first += GROUPS
            found[what] = asyncio.run(puts(address, first)) if what == "puts" else raw(address, first)
        ratios.append(found["puts"] / found["raw"])
        controls.append(found["control"] / found["raw"])
        print(" ".join(f"{name} {rate:.0f}/s" for name, rate in found.items()), flush=True)
    print(f"| puts, {PRODUCERS} producers, of raw psycopg | {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |")
    print(f"| raw psycopg, of itself | {median(controls):.2f} ({min(controls):.2f} to {max(controls):.2f}) |")
    rate, claimed, twice = claims(address)
    print(f"| claims of {AT_ONCE} by {CLAIMERS} processes | {rate:.1f} a second; {claimed} groups, {twice} of them twice |")
    for name, size, live, dead in bloat(address):
        print(f"| `{name}` | {size / 1024:.0f} KiB, {live} live rows, {dead} dead |")


if __name__ == "__main__":
    main()
