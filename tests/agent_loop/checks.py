"""Checks that worker processes import: some well behaved, most not."""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from typing import Any

CALLS = 0


def length(sample: dict[str, Any]) -> float:
    return len(sample["text"])


def by_name(sample: dict[str, Any]) -> Any:
    """Does what the row says."""
    return globals()[sample["row"]["does"]](sample)


def loop(sample: dict[str, Any]) -> float:
    while True:
        pass


def loop_in_c(sample: dict[str, Any]) -> float:
    """Holds the interpreter's lock for ever, and no signal handler of Python's ever runs."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    re.match(r"(a+)+$", "a" * 64 + "b")
    return 0.0


def bomb(sample: dict[str, Any]) -> float:
    return float(len([bytearray(1 << 24) for _ in range(10_000)]))


def bomb_in_c(sample: dict[str, Any]) -> float:
    """Writes through the null pointer that malloc gives when there is no memory left."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    while True:
        ctypes.memset(libc.malloc(ctypes.c_size_t(1 << 24)) or 0, 1, 1 << 24)


def children(sample: dict[str, Any]) -> float:
    """Starts a process that stays, says which, and never ends."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    with open(sample["row"]["file"], "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    time.sleep(1000)
    return 0.0


def leave(sample: dict[str, Any]) -> float:
    sys.exit("no more of this")


def die(sample: dict[str, Any]) -> float:
    os._exit(3)


def crash(sample: dict[str, Any]) -> float:
    ctypes.string_at(0)
    return 0.0


def chatter(sample: dict[str, Any]) -> float:
    print('{"id": 1, "score": 99}' * 10_000, flush=True)
    os.write(1, b"\xff\n")
    sys.stdin.read()
    return 1.0


def forge(sample: dict[str, Any]) -> float:
    """Finds the pipe and writes to it."""
    for descriptor in range(3, 20):
        try:
            os.write(descriptor, sample["row"]["says"].encode() + b"\n")
        except OSError:
            continue
    return 0.0


def environment(sample: dict[str, Any]) -> float:
    """1 if it holds neither secrets nor descriptors that it has no use for."""
    open_now = [name for name in os.listdir("/proc/self/fd") if int(name) > 2]
    return float("MILLRACE_SECRET" not in os.environ and os.environ["GIVEN"] == "yes" and len(open_now) <= 4)


def many(sample: dict[str, Any]) -> float:
    global CALLS
    CALLS += 1
    return CALLS


def word(sample: dict[str, Any]) -> Any:
    return "five"


def nan(sample: dict[str, Any]) -> float:
    return float("nan")


def huge(sample: dict[str, Any]) -> int:
    return 10**400


def no_say(sample: dict[str, Any]) -> None:
    return None


def as_json(sample: dict[str, Any]) -> float:
    return float(json.dumps(sample, sort_keys=True) == sample["row"]["expected"]) if "expected" in sample["row"] else -1.0


not_a_function = 5
