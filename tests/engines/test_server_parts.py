"""Shows what `VLLMServerEngine` decides: whom to ask, when to ask again, and that no answer of a server does harm."""

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_loop.engines.server.answers import (
    Answer,
    Entry,
    Events,
    Likely,
    Span,
    read_answer,
    read_likely,
    read_piece,
    read_scores,
    read_spans,
    read_top,
    read_whole,
)
from agent_loop.engines.server.breaker import LONGEST_WISH, Backoff, Breaker
from agent_loop.engines.server.client import seconds_of
from agent_loop.engines.server.faults import ReplicaError
from agent_loop.engines.server.routing import Affinity, choose

LOADS = st.lists(st.integers(0, 9), max_size=6)


@given(LOADS, st.integers(1, 9), st.integers(0, 5), st.integers(0, 4), st.integers(0, 100))
def test_a_request_goes_to_the_least_loaded_or_its_own_replica_and_never_to_a_full_one(
    loads: list[int], limit: int, preferred: int, slack: int, turn: int
) -> None:
    own = preferred if preferred < len(loads) else None
    place = choose(loads, limit, own, slack, turn)
    if place is None:
        assert all(load >= limit for load in loads)
    else:
        assert loads[place] < limit
        assert loads[place] <= min(loads) + (slack if place == own else 0)
        if own is not None and loads[own] < limit and loads[own] <= min(loads) + slack:
            assert place == own


def test_equally_loaded_replicas_take_turns() -> None:
    assert [choose([1, 0, 0], 5, None, 0, turn) for turn in range(4)] == [1, 2, 1, 2]


def test_sessions_that_were_not_heard_of_for_long_are_forgotten() -> None:
    affinity = Affinity(most=2)
    for session in ("a", "b", "a", "c"):
        affinity.served(session, f"server of {session}")
    affinity.served(None, "nobody's")
    assert [affinity.of(session) for session in ("a", "b", "c", None)] == ["server of a", None, "server of c", None]


def test_a_breaker_opens_after_failures_in_a_row_and_probes_at_once_then_later_and_later() -> None:
    breaker = Breaker(threshold=3, base=1.0, most=5.0)
    breaker.failed(10.0)
    breaker.failed(10.0)
    breaker.succeeded()
    breaker.failed(10.0)
    breaker.failed(10.0)
    assert breaker.due is None
    breaker.failed(10.0)
    assert breaker.due == 10.0
    waits = []
    for _ in range(5):
        breaker.trip(20.0)
        assert breaker.due is not None
        waits.append(breaker.due - 20.0)
    assert waits == [1.0, 2.0, 4.0, 5.0, 5.0]
    breaker.close()
    assert breaker.due is None
    breaker.trip(30.0)
    assert breaker.due == 35.0, "a probe alone is no request that succeeded"
    breaker.succeeded()
    breaker.trip(40.0)
    assert breaker.due == 40.0


def test_a_full_replica_is_left_alone_as_it_asks_or_longer_each_time() -> None:
    backoff = Backoff(base=1.0, most=8.0)
    backoff.refused(0.0, 3.0, luck=1.0)
    assert backoff.until == 3.0
    backoff.refused(0.5, None, luck=1.0)  # sent before it said so
    assert backoff.until == 3.0
    backoff.refused(4.0, None, luck=1.0)
    assert backoff.until == 6.0
    backoff.accepted()
    backoff.refused(10.0, None, luck=0.0)
    assert backoff.until == 10.5
    backoff.refused(20.0, 1e9, luck=1.0)
    assert backoff.until == 20.0 + LONGEST_WISH


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("7", 7.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 40.0),
        ("soon", None),
        ("inf", None),
        ("nan", None),
    ],
)
def test_retry_after_is_a_number_or_a_date(header: str | None, seconds: float | None) -> None:
    assert seconds_of(header, 60.0) == seconds


EVENTS = [b'{"a": 1}', b"", b"[DONE]", b"x" * 50]


@given(st.lists(st.integers(1, 40), min_size=1))
def test_events_are_the_same_however_their_bytes_come(sizes: list[int]) -> None:
    data = b": a comment\n\n" + b"".join(b"data: " + event + b"\n\n" for event in EVENTS)
    events, found, at = Events(), list[bytes](), 0
    while at < len(data):
        size = sizes[at % len(sizes)]
        found += events.feed(data[at : at + size])
        at += size
    assert found == EVENTS


NAMES = ["choices", "token_ids", "logprobs", "content", "finish_reason", "weight_versions", "request_id", "token_id", "logprob"]
NAMES += ["version", "start", "end", "prompt_logprobs", "top_logprobs", "error", "4", "5"]
VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.sampled_from(["stop", "4", "default", "x", 1 << 62]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)
SOUND: dict[str, Any] = {
    "request_id": "a",
    "choices": [
        {
            "token_ids": [4],
            "logprobs": {"content": [{"token_id": 4, "logprob": -1.0, "top_logprobs": [{"token_id": 4, "logprob": -1.0}]}]},
            "finish_reason": "stop",
            "weight_versions": [{"version": "default", "start": 0, "end": 1}],
        }
    ],
    "prompt_logprobs": [None, {"5": {"logprob": -2.0}}],
}


def paths(value: Any) -> list[list[Any]]:
    """The way to each place within a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [[], *([key, *rest] for key, inner in items for rest in paths(inner))]


def with_change(value: Any, path: list[Any], new: Any) -> Any:
    """A copy with another value at a place."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = with_change(value[path[0]], path[1:], new)
    return copy


@given(st.sampled_from(paths(SOUND)), VALUES)
def test_whatever_a_server_answers_is_read_or_refused_and_breaks_nothing(path: list[Any], new: Any) -> None:
    answer = with_change(SOUND, path, new)
    try:
        piece = read_piece(json.dumps(answer).encode(), 64, 1)
    except ReplicaError:
        pass
    else:
        assert all(len(ids) == 1 and 0 <= ids[0] < 64 and logprobs[0] <= 0 for ids, logprobs in piece.top)
        assert len(piece.tokens) == len(piece.logprobs)
        assert all(0 <= token < 64 for token in piece.tokens)
        assert all(-10_000 < logprob <= 0 for logprob in piece.logprobs)
    reads: list[Callable[[Answer], object]] = [
        lambda told: read_scores(told, [4, 5]),
        lambda told: read_likely(read_whole(told, 64)[0], 1, 64),
    ]
    for read in reads:
        with contextlib.suppress(ReplicaError):
            read(read_answer(json.dumps(answer).encode()))


def test_a_sound_answer_is_read() -> None:
    piece = read_piece(json.dumps(SOUND).encode(), 64)
    assert (piece.tokens, piece.logprobs, piece.finish, piece.labels, piece.server_id) == ([4], [-1.0], "stop", ["default"], "a")
    answer = read_answer(json.dumps(SOUND).encode())
    assert read_scores(answer, [4, 5]) == [-2.0]
    assert read_likely(read_whole(answer, 64)[0], 1, 64) == {4: -1.0}


def test_the_likeliest_are_told_by_their_ranks_whichever_was_sampled() -> None:
    ranked = [Likely(7, -0.5, 1), Likely(8, -1.0, 2), Likely(9, -9999.0, 3)]
    for sampled in ([], [ranked[1]], [Likely(3, -4.0, 20)]):  # told first; where it is none of the likeliest, the last of those is left out
        entry = Entry(1, -1.0, [*sampled, *(one for one in ranked if one not in sampled)][:3])
        assert read_top(entry, 2, 64) == ([7, 8], [-0.5, -1.0])
    assert read_top(Entry(7, -0.5, ranked), 3, 64)[1] == [-0.5, -1.0, float("-inf")]
    for odd in ([], ranked[:2], [*ranked[:2], Likely(64, -2.0, 3)], [*ranked[:2], Likely(7, -2.0, 3)], [*ranked[:2], Likely(6, 2.0, 3)]):
        with pytest.raises(ReplicaError):
            read_top(Entry(7, -0.5, odd), 3, 64)


@pytest.mark.parametrize("start", [1, -1])
def test_spans_that_do_not_follow_one_another_are_refused(start: int) -> None:
    with pytest.raises(ReplicaError, match="follow"):
        read_spans([Span("a", start, 2)])
