"""`millrace simulate` compares strategies on the lengths of a run, as a table, JSON and a plot, and says what keeps it from doing so."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from producer.cli.simulating import app
from tests.cli.command import millrace

QUICK = ("simulate", "--steps", 4, "--slots", 8, "--batch-size", 3, "--group-size", 2, "--prompts", 12)


def test_a_sweep_is_a_table_and_a_plot(tmp_path: Path) -> None:
    done = millrace(*QUICK, "--sweep", "staleness_threshold=0,0.5,1", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(line == line[:80] for line in done.stdout.splitlines())
    for text in ("faster", "sync", "staleness_threshold=0.5", "plot saved to simulation.png"):
        assert text in done.stdout
    assert (tmp_path / "simulation.png").read_bytes().startswith(b"\x89PNG")


def test_lengths_are_those_of_a_run(db: Path) -> None:
    done = millrace("simulate", "--from", db, "--task", "demo", "--steps", 3, "--sweep", "max_staleness=0,1", "--json", "--no-plot")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["plot"] is None
    assert [run["options"] for run in found["runs"]] == [{}, {"max_staleness": 0}, {"max_staleness": 1}]
    assert found["runs"][0]["speed_up"] == 1.0
    assert {run["rollouts"] for run in found["runs"]} == {found["runs"][0]["rollouts"]}


def test_every_combination_of_sweeps_is_tried(tmp_path: Path) -> None:
    plot = tmp_path / "some.svg"
    done = millrace(*QUICK, "--sweep", "max_staleness=1,2", "--sweep", "in_flight=keep,interrupt", "--plot", plot, "--json")
    runs = json.loads(done.stdout)["runs"]
    assert [tuple(run["options"].values()) for run in runs[1:]] == [(1, "keep"), (1, "interrupt"), (2, "keep"), (2, "interrupt")]
    assert all(int(age) <= run["options"]["max_staleness"] for run in runs[1:] for age in run["staleness"])
    assert "speed-up over sync" in plot.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--strategy", "quick"], "strategy 'quick' is unknown"),
        (["--set", "speed=2"], "takes no option 'speed'"),
        (["--set", "max_staleness=1,2"], "use --sweep"),
        (["--set", "staleness_threshold=-1"], "staleness_threshold=-1"),
        (["--from", "absent.db"], "there is no file"),
        (["--longest", "10"], "no less than the median"),
        (["--plot", "plot.unknown"], "plot='plot.unknown' names no format"),
        (["--plot", "absent/plot.png"], "'absent' is no folder"),
        (["--sweep", "staleness_threshold=0", "--sweep", "staleness-threshold=1"], "staleness_threshold is given more than once"),
        (["--set", "enable_partial_rollout=no"], "enable_partial_rollout='no' must be True or False"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = millrace(*QUICK, *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("millrace: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert done.stdout == "", "refused before anything is simulated"


def test_a_long_response_is_no_stall_and_the_table_is_there_where_the_plot_cannot_be_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("producer.simulate.plot.plot", full)
    done = CliRunner().invoke(
        app, [str(word) for word in QUICK[:-2]] + ["--prompts", "2", "--rate", "1", "--plot", str(tmp_path / "a.png")]
    )
    assert done.exit_code == 1
    assert "faster" in done.stdout
    assert (done.stderr.count("\n"), "No space left" in done.stderr) == (1, True)


def test_without_matplotlib_there_is_a_table_and_a_plot_that_was_asked_for_is_refused_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    quick = [str(word) for word in QUICK]
    without = CliRunner().invoke(app, quick)
    assert without.exit_code == 0
    assert "faster" in without.output
    assert "no plot is saved: a plot needs matplotlib" in without.output
    refused = CliRunner().invoke(app, [*quick, "--plot", "a.png"])
    assert refused.exit_code == 1
    assert "pip install 'millrace[plot]'" in refused.output
    assert list(tmp_path.iterdir()) == []
