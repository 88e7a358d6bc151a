"""The demo, shortened: it trains through real engines, and killed or interrupted it goes on where it was, losing nothing."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from buffer import ReplayBuffer, Status

ROOT = Path(__file__).parent.parent
STEPS, BATCH, GROUP, CHECKPOINT_EVERY = 24, 16, 8, 5


def start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    """The demo as `make demo` starts it, smaller."""
    sizes = ["--steps", str(STEPS), "--batch-size", str(BATCH), "--group-size", str(GROUP), "--checkpoint-every", str(CHECKPOINT_EVERY)]
    command = [sys.executable, str(ROOT / "examples" / "train_arithmetic.py"), "--out", str(out), *sizes, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def stop_in_mid_run(process: subprocess.Popen[str], with_signal: signal.Signals) -> int:
    """Send the signal once the bar shows a step behind the first checkpoint; gives the exit status."""
    assert process.stderr is not None
    seen = ""
    while not (found := re.search(rf" (\d+)/{STEPS} ", seen)) or int(found[1]) <= CHECKPOINT_EVERY:
        character = process.stderr.read(1)
        assert character, f"the demo ended before it was stopped:\n{seen}"
        seen = "" if character in "\r\n" else seen + character
    assert int(found[1]) < STEPS
    process.send_signal(with_signal)
    process.communicate()
    return process.returncode


def finish(process: subprocess.Popen[str]) -> str:
    """Let it end well; gives what it printed."""
    out, error = process.communicate()
    assert process.returncode == 0, error
    return out


async def check_whole_run(out: Path) -> None:
    """Each step consumed one batch, no prompt twice, nothing is lost, and all of it is final."""
    async with ReplayBuffer.open(f"sqlite:///{out / 'run.db'}") as buffer:
        assert (report := await buffer.audit()).ok, report.problems
        counts = await buffer.counts("sums")
        assert counts[Status.ARCHIVED] == STEPS * BATCH
        assert counts[Status.RUNNING] == counts[Status.CONSUMED] == counts[Status.FAILED] == 0
    with sqlite3.connect(out / "run.db") as database:
        by_step = database.execute("select consumed_step, count(*) from groups where status = 'archived' group by 1 order by 1").fetchall()
        positions = database.execute("select epoch, position from groups").fetchall()
    assert by_step == [(step, BATCH) for step in range(1, STEPS + 1)]
    assert len(set(positions)) == len(positions)
    page = (out / "report.html").read_text()
    assert f"Task sums, steps 1 to {STEPS}." in page
    assert page.count("<svg") >= 7


@pytest.mark.parametrize("with_signal", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
async def test_a_stopped_run_goes_on_from_its_checkpoint(tmp_path: Path, with_signal: signal.Signals) -> None:
    """What was consumed after the last checkpoint is handed out again, and the run ends as if nothing had happened."""
    status = stop_in_mid_run(start(tmp_path), with_signal)
    assert status == (-signal.SIGKILL if with_signal is signal.SIGKILL else 1)
    out = finish(start(tmp_path))
    assert (found := re.search(r"going on from the checkpoint of step (\d+)", out)), out
    assert 0 < int(found[1]) < STEPS
    assert int(found[1]) % CHECKPOINT_EVERY == 0
    await check_whole_run(tmp_path)


async def test_a_finished_run_is_reported_again(tmp_path: Path) -> None:
    """The command may be repeated when all is done: it trains no more and reports the same."""
    first, second = finish(start(tmp_path)), finish(start(tmp_path))
    rewards = [line for line in first.splitlines() if line.startswith("mean reward")]
    assert rewards == [line for line in second.splitlines() if line.startswith("mean reward")] != []
    await check_whole_run(tmp_path)


async def test_the_demo_on_vllm(tmp_path: Path) -> None:
    """The same file, the same run, sampled by vLLM; killed and resumed too, and the killed one leaves no process behind."""
    first = start(tmp_path, "--engine", "vllm")
    stop_in_mid_run(first, signal.SIGKILL)  # returns when nobody holds the pipes any more: vLLM's processes inherit them
    assert "going on from the checkpoint of step" in finish(start(tmp_path, "--engine", "vllm"))
    await check_whole_run(tmp_path)
