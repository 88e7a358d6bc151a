"""The console command `millrace`: look into a run's database, also while another process writes to it, and keep it in order.

It stands on top of everything and is imported by nothing: `import producer` loads neither typer nor rich.
"""

import sys
from typing import TextIO

__all__ = ["main"]


def main() -> None:
    """Run the command of `sys.argv` and exit: 0 fine, 1 no answer or the audit found something, 2 wrong usage."""
    from producer.cli.report import app

    for stream in (sys.stdout, sys.stderr):
        _never_fail_to_encode(stream)
    app(prog_name="millrace")


def _never_fail_to_encode(stream: TextIO) -> None:
    # A terminal that is not UTF-8 gets escapes for what it cannot show, not a traceback.
    if reconfigure := getattr(stream, "reconfigure", None):
        reconfigure(errors="backslashreplace")
