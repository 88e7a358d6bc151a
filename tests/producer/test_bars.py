"""Shows that the bars of a batch say how many groups are completed and how many rollouts are in flight, and only on a terminal."""

import io

import pytest

from producer import bars as module
from producer.bars import Bars


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, disable: bool | None) -> str:
    tqdm = module.tqdm
    monkeypatch.setattr(module, "tqdm", lambda **options: tqdm(file=stream, ncols=80, mininterval=0, **options))
    with Bars("math", 4, disable) as bars:
        for completed, in_flight in ((0, 8), (1, 6), (6, 2), (3, 0)):
            bars.completed(completed)
            bars.in_flight(in_flight)
    return stream.getvalue()


def test_both_are_drawn_on_a_terminal_and_gone_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = drawn(Terminal(), monkeypatch, None)
    for part in ("math:", "1/4", "4/4", "math in flight:    8 |", "math in flight:    6 |", "math in flight:    2 |", "at most 8"):
        assert part in shown
    assert "6/4" not in shown, "what is completed beyond the batch is not of it"
    assert shown.endswith("\r"), "nothing is left of them"


@pytest.mark.parametrize(("stream", "disable"), [(io.StringIO(), None), (Terminal(), True)], ids=["no terminal", "told not to"])
def test_else_nothing_is_drawn(stream: io.StringIO, disable: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(stream, monkeypatch, disable) == ""
