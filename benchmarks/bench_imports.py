"""How long each package takes to import, beside an empty program: `python -m benchmarks.bench_imports` prints a table."""

import subprocess
import sys
import time
from statistics import median

REPEATS = 7
PACKAGES = ("buffer", "agent_loop", "producer")
HEAVY = ("torch", "vllm", "transformers", "trl", "httpx")


def seconds(code: str) -> float:
    """Of a fresh interpreter in which the heavy libraries cannot be imported, as where they are not installed."""
    hidden = f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r})); "
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", hidden + code], check=True)
    return time.perf_counter() - began


def main() -> None:
    """Median of several runs, in turns, so that a busy moment hits all alike."""
    programs = {"pass": "pass"} | {package: f"import {package}" for package in PACKAGES}
    times = {name: list[float]() for name in programs}
    for _ in range(REPEATS):
        for name, code in programs.items():
            times[name].append(seconds(code))
    print("| import | seconds, of which the interpreter |")
    print("| --- | --- |")
    for name in PACKAGES:
        print(f"| `{name}` | {median(times[name]):.2f}, {median(times['pass']):.2f} |")


if __name__ == "__main__":
    main()
