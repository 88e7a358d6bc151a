"""Which processes of this machine live: what a dead one ran needs not wait until its lease runs out."""

import zlib
from contextlib import suppress
from functools import cache
from pathlib import Path


@cache
def machine() -> str:
    """Of all processes with the same, a process id names one: a machine since it was started, or a container. "0": not known."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
        return f"{zlib.crc32(boot + str(Path('/proc/self/ns/pid').stat().st_ino).encode()):x}"
    return "0"


def is_dead(owner: str, pid: int) -> bool:
    """Whether the producer of this name ran here and its process is gone. In doubt it is not."""
    where = owner.rpartition("/")[2].partition("-")[0]
    return where == machine() != "0" and not Path(f"/proc/{pid}").exists()
