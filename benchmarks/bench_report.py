"""What `millrace report` takes: a run of 100 000 groups of 8 over 1 000 steps and three tasks, as numbers, as a page, as a picture.

    python -m benchmarks.bench_report [--groups 100000] [--rounds 3]

Each is a process of its own, as users start it: CPU time of it, and the most memory that it had. The first row is a run of 1 000 groups:
what it takes to start.
"""

import argparse
import asyncio
import multiprocessing
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

from benchmarks.large import Kind, make_large
from benchmarks.workload import Database, make_group, print_table, scratch, spread
from buffer import ReplayBuffer, Status

STEPS, TASKS = 1000, ("code", "math", "tools")


async def make(path: Path, groups: int) -> None:
    """Groups without payloads that were archived at steps in their order, one in twenty filtered."""
    async with ReplayBuffer.open(f"sqlite:///{path}"):
        pass
    each = groups // len(TASKS)
    step = f"1 + (i % {each}) * {STEPS} / {each}"
    kinds = []
    for task in TASKS:
        trained = Kind(
            make_group(1, task_name=task, tokens=16, words=1), each - each // 20, {"status": "'archived'", "consumed_step": step}
        )
        filtered = Kind(make_group(1, task_name=task, tokens=16, words=1), each // 20, {"status": "'filtered'"})
        kinds += [trained, filtered]
    await make_large(path, kinds)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(
            f"INSERT INTO steps WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {STEPS}) SELECT i, i FROM n"
        )
        database.execute("UPDATE rollouts SET reward = abs(random() % 1000) / 1000.0")
        now = "1e9 + coalesce(consumed_step, group_id % 1000)"
        changes = f"SELECT group_id, {now}, '{Status.COMPLETED}', '{Status.CONSUMED}', 'bench', consumed_step, 3, NULL FROM groups"
        into = "transitions (group_id, at, source, target, owner, step, version, reason)"
        database.execute(f"INSERT INTO {into} {changes} WHERE consumed_step IS NOT NULL")


def made(path: Path, groups: int) -> None:
    """`make`, for a process."""
    asyncio.run(make(path, groups))


def measured(path: Path, *arguments: str) -> tuple[float, float]:
    """Seconds of CPU, and MiB at the most."""
    process = subprocess.Popen([sys.executable, "-m", "producer.cli", "report", str(path), *arguments], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows = []
    with scratch() as name:
        files = Database(Path(name))
        for groups in (1_000, options.groups):
            # In a process of its own: what the parent has at its most counts as the child's.
            maker = multiprocessing.get_context("spawn").Process(target=made, args=(path := files.new(), groups))
            maker.start()
            maker.join()
            assert maker.exitcode == 0
            for what in ("--json", "report.html", "report.png"):
                arguments = ["--json"] if what == "--json" else ["--out", str(Path(name) / what)]
                found = [measured(path, *arguments) for _ in range(options.rounds)]
                seconds, megabytes = zip(*found, strict=True)
                rows.append([f"{groups:,} groups, {what}", spread(seconds), spread(megabytes, ".0f")])
    print_table(["a report of", "CPU, s", "most memory, MiB"], rows)


if __name__ == "__main__":
    main()
