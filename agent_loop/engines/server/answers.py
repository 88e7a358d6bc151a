"""What a server answers, read as untrusted data: sizes, ids and numbers are checked before anything is made of them. Pure."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agent_loop.engines.server.faults import ReplicaError

NO_LOGPROB = -9990.0
"""vLLM writes -9999 where it has no log-probability, or one that is no number."""

MOST_TOKENS = 1 << 22
"""Of one response; versions of more are nonsense."""

LARGEST_EVENT = 16 << 20
"""Bytes of one event of a stream; more is no answer to our requests."""

_FINISHED = (None, "stop", "length", "abort")


@dataclass(frozen=True, slots=True)
class Piece:
    """One event of a stream.

    Attributes:
        server_id: the server's own name of the request, by which it is aborted.
        finish: None while the response goes on.
        labels: which weights sampled each token of the whole response; with `finish` only.
    """

    server_id: str
    tokens: list[int]
    logprobs: list[float]
    finish: str | None
    labels: list[str] | None


class Events:
    """Server-sent events out of bytes as they come in."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the events that are whole now."""
        *whole, self._rest = (self._rest + data).split(b"\n\n")
        if len(self._rest) > LARGEST_EVENT:
            raise ReplicaError(f"an event of more than {LARGEST_EVENT} bytes")
        return [event[6:] for event in whole if event.startswith(b"data: ")]


def parse(data: bytes) -> dict[str, Any]:
    """A JSON object, or `ReplicaError`."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ReplicaError(f"an answer that is no JSON: {data[:80]!r}") from error
    if not isinstance(value, dict):
        raise ReplicaError(f"an answer that is no JSON object: {data[:80]!r}")
    return value


def read_piece(data: bytes, vocab_size: int) -> Piece:
    """One event of `/inference/v1/generate`.

    Raises:
        ReplicaError: an error that the server reports, or nonsense.
    """
    event = parse(data)
    if "error" in event:
        raise ReplicaError(f"the server broke off: {error_message(event)}")
    try:
        (choice,) = event["choices"]
        tokens = choice["token_ids"] or []
        content = (choice["logprobs"] or {}).get("content") or []
        finish = choice["finish_reason"]
        spans = choice.get("weight_versions")
        server_id = event["request_id"]
        logprobs = read_logprobs(tokens, content, vocab_size)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReplicaError(f"an answer of an unknown form ({error!r}): {data[:200]!r}") from error
    if finish not in _FINISHED:
        raise ReplicaError(f"unknown finish reason {finish!r}; known are {_FINISHED[1:]}")
    if type(server_id) is not str:
        raise ReplicaError(f"a request id that is no text: {server_id!r:.50}")
    return Piece(server_id, tokens, logprobs, finish, None if spans is None else read_spans(spans))


def read_logprobs(tokens: Any, content: Any, vocab_size: int) -> list[float]:
    """The log-probability of each of the tokens, both checked."""
    if type(tokens) is not list or type(content) is not list or len(tokens) != len(content):
        raise ReplicaError(f"{_size(tokens)} tokens with {_size(content)} log-probabilities")
    logprobs = [entry["logprob"] for entry in content]
    for token, logprob, entry in zip(tokens, logprobs, content, strict=True):
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ReplicaError(f"token {token!r:.50} outside the vocabulary of {vocab_size}")
        if entry["token_id"] != token:
            raise ReplicaError(f"the log-probability of token {entry['token_id']!r:.50} where that of {token} belongs")
        check_logprob(token, logprob)
    return [min(float(logprob), 0.0) for logprob in logprobs]


def check_logprob(token: int, logprob: Any) -> None:
    """Refuse what is no log-probability; a rounding error above 0 is let through."""
    if type(logprob) not in (float, int) or not math.isfinite(logprob) or not NO_LOGPROB < logprob < 1e-3:
        raise ReplicaError(f"log-probability {logprob!r:.50} of token {token}; finite ones up to 0 are known: are the weights sound?")


def read_spans(spans: Any) -> list[str]:
    """The label of the weights of each token, from spans `[start, end)` that follow one another."""
    labels: list[str] = []
    try:
        for span in spans:
            label, start, end = span["version"], span["start"], span["end"]
            if type(label) is not str or start != len(labels) or not start <= end <= MOST_TOKENS:
                raise ReplicaError(f"versions in spans that do not follow one another: {spans!r:.100}")
            labels += [label] * (end - start)
    except (KeyError, TypeError) as error:
        raise ReplicaError(f"versions of an unknown form: {spans!r:.100}") from error
    return labels


def read_whole(answer: dict[str, Any], vocab_size: int) -> tuple[dict[str, Any], str]:
    """The only choice of an answer that is no stream, with its one token's log-probability checked, and the label of its weights."""
    try:
        (choice,) = answer["choices"]
        (entry,) = choice["logprobs"]["content"]
        read_logprobs(choice["token_ids"], [entry], vocab_size)
        (label,) = read_spans(choice["weight_versions"])
    except (KeyError, TypeError, ValueError) as error:
        raise ReplicaError(f"an answer of an unknown form ({error!r}): {answer!r:.200}") from error
    return choice, label


def read_scores(answer: dict[str, Any], ids: Sequence[int]) -> list[float]:
    """The log-probabilities of `ids` but the first, out of `prompt_logprobs`."""
    try:
        told = answer["prompt_logprobs"]
        if type(told) is not list or len(told) != len(ids):
            raise ReplicaError(f"log-probabilities of {_size(told)} tokens, where {len(ids)} were asked for")
        scores = [entry[str(token)]["logprob"] for entry, token in zip(told[1:], ids[1:], strict=True)]
    except (KeyError, TypeError) as error:
        raise ReplicaError(f"log-probabilities of an unknown form ({error!r})") from error
    for token, score in zip(ids[1:], scores, strict=True):
        check_logprob(token, score)
    return [float(score) for score in scores]


def read_likely(choice: dict[str, Any], count: int, vocab_size: int) -> dict[int, float]:
    """The likeliest tokens and their log-probabilities."""
    try:
        entries = choice["logprobs"]["content"][0]["top_logprobs"]
        tokens = [entry["token_id"] for entry in entries]
        logprobs = read_logprobs(tokens, entries, vocab_size)
    except (KeyError, TypeError, IndexError) as error:
        raise ReplicaError(f"likely tokens of an unknown form ({error!r})") from error
    if len(set(tokens)) != count:
        raise ReplicaError(f"{len(set(tokens))} likely tokens, where {count} were asked for")
    return dict(zip(tokens, logprobs, strict=True))


def error_message(answer: Any) -> str:
    """What an answer says of an error, cut to a length that fits a message."""
    error = answer.get("error", answer.get("detail", answer)) if isinstance(answer, dict) else answer
    text = error.get("message", error) if isinstance(error, dict) else error
    return str(text)[:500]


def _size(value: Any) -> str:
    return str(len(value)) if isinstance(value, list) else f"{value!r:.30} for"
