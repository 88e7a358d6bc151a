"""Resident memory of a process with a large buffer open, over the same process with an empty one.

    python -m benchmarks.bench_buffer_memory [--megabytes 256] [--rounds 5]

Each figure is a process of its own, which opens the buffer, counts, waits a moment and reads VmRSS; then, with the large one, it
also takes and drops 64 groups of 64 KiB.
"""

import argparse
import asyncio
import sys
from pathlib import Path

from benchmarks.large import Kind, make_large, of_64_kib
from benchmarks.workload import Database, in_rounds, print_table, scratch, spread
from buffer import ReplayBuffer, Status

PAYLOAD = 2**16


def resident() -> float:
    """MB of this process in memory."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024 / 1e6


async def child(path: str) -> None:
    """Open and say how much memory that takes, and how much after a batch was taken."""
    async with ReplayBuffer.open(f"sqlite:///{path}") as buffer:
        await buffer.count("tokens", Status.COMPLETED)
        await asyncio.sleep(0.2)
        print(resident())
        await buffer.take("tokens", 64, step=1)
        await buffer.resume(step=0)
        print(resident())


async def measured(path: Path) -> tuple[float, float]:
    """What such a process says."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.bench_buffer_memory", "--child", str(path), stdout=asyncio.subprocess.PIPE
    )
    said, _ = await process.communicate()
    idle, taken = said.split()
    return float(idle), float(taken)


async def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=256, help="of payloads in the large buffer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        await child(options.child)
        return
    with scratch() as name:
        files = Database(Path(name))
        empty, large = files.new(), files.new()
        async with ReplayBuffer.open(f"sqlite:///{empty}"):
            pass
        await make_large(large, [Kind(of_64_kib("tokens"), max(64, options.megabytes * 10**6 // PAYLOAD), {})])
        rounds = await in_rounds({"empty": lambda: measured(empty), "large": lambda: measured(large)}, options.rounds)
        size = large.stat().st_size / 1e6
    columns = {name: [list(values) for values in zip(*own, strict=True)] for name, own in rounds.items()}
    over = [[b - a for a, b in zip(columns["empty"][0], own, strict=True)] for own in columns["large"]]
    head = ["resident memory, MB", "empty buffer", f"buffer of {size:.0f} MB", "over the empty one"]
    what = ("open and idle", "after take(64) of 64 KiB, against the empty one idle")
    rows = [
        [name, spread(columns["empty"][0], ".1f"), spread(columns["large"][n], ".1f"), spread(over[n], ".1f")]
        for n, name in enumerate(what)
    ]
    print_table(head, rows)


if __name__ == "__main__":
    asyncio.run(main())
