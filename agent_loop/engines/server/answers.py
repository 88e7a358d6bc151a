"""What a server answers, read as untrusted data: forms, sizes, ids and numbers are checked before anything is made of them. Pure."""

import json
import math
from collections.abc import Sequence
from typing import Any, TypeVar

from agent_loop.engines.server.faults import ReplicaError
from agent_loop.errors import RequestRefusedError

try:
    import msgspec
except ImportError as error:
    raise ImportError("VLLMServerEngine needs msgspec: pip install 'millrace[server]'") from error

NO_LOGPROB = -9990.0
"""vLLM writes -9999 where it has no log-probability, or one that is no number."""

MOST_TOKENS = 1 << 22
"""Of one response; versions of more are nonsense."""

LARGEST_EVENT = 16 << 20
"""Bytes of one event of a stream; more is no answer to our requests."""

REFUSALS = (400, 413, 422)
"""By which a server says that a request can never succeed."""

_FINISHED = (None, "stop", "length", "abort")

Form = TypeVar("Form")


class Likely(msgspec.Struct, gc=False):
    """A token, its log-probability, and its place among the likeliest ones, from 1."""

    token_id: int
    logprob: float
    rank: int | None = None


class Entry(msgspec.Struct, gc=False):
    """A sampled token, its log-probability, and the likeliest ones at its place."""

    token_id: int
    logprob: float
    top_logprobs: list[Likely] = []


class Logprobs(msgspec.Struct, gc=False):
    """Of the tokens of a piece."""

    content: list[Entry] | None = None


class Span(msgspec.Struct, gc=False):
    """Tokens `[start, end)` were sampled by weights of this label."""

    version: str
    start: int
    end: int


class Choice(msgspec.Struct, gc=False):
    """A response, or a piece of it."""

    token_ids: list[int] | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    weight_versions: list[Span] | None = None


class Answer(msgspec.Struct, gc=False):
    """What `/inference/v1/generate` answers, as far as we look at it."""

    choices: list[Choice]
    request_id: str = ""
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    prompt_token_ids: list[int] | None = None


class Piece(msgspec.Struct, gc=False):
    """One event of a stream.

    Attributes:
        server_id: the server's own name of the request, by which it is aborted.
        finish: None while the response goes on.
        labels: which weights sampled each token of the whole response; with `finish` only.
        prompt_size: tokens of the prompt with its images; 0 where it was not asked for, or was told before.
        top: the likeliest tokens at the place of each token and their log-probabilities, where they were asked for.
    """

    server_id: str
    tokens: list[int]
    logprobs: list[float]
    finish: str | None
    labels: list[str] | None
    top: list[tuple[list[int], list[float]]] = []
    prompt_size: int = 0


_decode = msgspec.json.Decoder(Answer).decode


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


def read_answer(data: bytes) -> Answer:
    """An answer with its one choice.

    Raises:
        RequestRefusedError: the server reports that the request can never succeed; within a stream, its status is an event.
        ReplicaError: another error that the server reports, or an answer of another form.
    """
    try:
        answer = _decode(data)
    except (msgspec.MsgspecError, RecursionError) as error:
        told = parse(data)
        if "error" in told:
            refused = isinstance(told["error"], dict) and told["error"].get("code") in REFUSALS
            raise (RequestRefusedError if refused else ReplicaError)(f"the server broke off: {error_message(told)}") from None
        raise ReplicaError(f"an answer of an unknown form ({error}): {data[:200]!r}") from error
    if len(answer.choices) != 1:
        raise ReplicaError(f"an answer with {len(answer.choices)} choices, where one was asked for")
    return answer


def read_piece(data: bytes, vocab_size: int, top: int = 0) -> Piece:
    """One event of `/inference/v1/generate`, with so many of the likeliest tokens.

    Raises:
        ReplicaError: an error that the server reports, or nonsense.
    """
    answer = read_answer(data)
    choice = answer.choices[0]
    if choice.finish_reason not in _FINISHED:
        raise ReplicaError(f"unknown finish reason {choice.finish_reason!r:.50}; known are {_FINISHED[1:]}")
    tokens = choice.token_ids or []
    content = _content(choice)
    logprobs = read_logprobs(tokens, content, vocab_size)
    labels = None if choice.weight_versions is None else read_spans(choice.weight_versions)
    likely = [read_top(entry, top, vocab_size) for entry in content] if top else []
    return Piece(answer.request_id, tokens, logprobs, choice.finish_reason, labels, likely, len(answer.prompt_token_ids or ()))


def _content(choice: Choice) -> list[Entry]:
    return (choice.logprobs.content if choice.logprobs is not None else None) or []


def read_logprobs(tokens: list[int], content: Sequence[Entry | Likely], vocab_size: int) -> list[float]:
    """The log-probability of each of the tokens, both checked."""
    if len(tokens) != len(content):
        raise ReplicaError(f"{len(tokens)} tokens with {len(content)} log-probabilities")
    if not tokens:
        return []
    logprobs = [entry.logprob for entry in content]
    if not (min(tokens) >= 0 and max(tokens) < vocab_size):
        raise ReplicaError(f"tokens from {min(tokens)} to {max(tokens)} outside the vocabulary of {vocab_size}")
    if [entry.token_id for entry in content] != tokens:
        raise ReplicaError(f"log-probabilities of other tokens ({content[0].token_id}, ...) than those given ({tokens[0]}, ...)")
    return check_logprobs(logprobs)


def check_logprobs(logprobs: list[float]) -> list[float]:
    """Refuse what is no log-probability; a rounding error above 0 becomes 0."""
    # A sum with anything that is no number in it is none.
    if logprobs and not (math.isfinite(sum(logprobs)) and min(logprobs) > NO_LOGPROB and max(logprobs) < 1e-3):
        worst = next(one for one in logprobs if not NO_LOGPROB < one < 1e-3)
        raise ReplicaError(f"log-probability {worst!r:.50}; finite ones up to 0 are known: are the weights sound?")
    return [min(logprob, 0.0) for logprob in logprobs] if logprobs and max(logprobs) > 0 else logprobs


def read_spans(spans: Sequence[Span]) -> list[str]:
    """The label of the weights of each token, from spans `[start, end)` that follow one another."""
    labels: list[str] = []
    for span in spans:
        if span.start != len(labels) or not span.start <= span.end <= MOST_TOKENS:
            raise ReplicaError(f"versions in spans that do not follow one another: {spans!r:.100}")
        labels += [span.version] * (span.end - span.start)
    return labels


def read_whole(answer: Answer, vocab_size: int) -> tuple[Entry, str]:
    """The one token of an answer that is no stream, and the label of its weights."""
    choice = answer.choices[0]
    content, labels = _content(choice), read_spans(choice.weight_versions or ())
    read_logprobs(choice.token_ids or [], content, vocab_size)
    if len(content) != 1 or len(labels) != 1:
        raise ReplicaError(f"{len(content)} tokens of {len(labels)} versions, where one was asked for")
    return content[0], labels[0]


def read_scores(answer: Answer, ids: Sequence[int]) -> list[float]:
    """The log-probabilities of `ids` but the first, out of `prompt_logprobs`."""
    told = answer.prompt_logprobs or []
    if len(told) != len(ids):
        raise ReplicaError(f"log-probabilities of {len(told)} tokens, where {len(ids)} were asked for")
    try:
        scores = [float(entry[str(token)]["logprob"]) for entry, token in zip(told[1:], ids[1:], strict=True)]  # type: ignore[index]  # caught
    except (KeyError, TypeError, ValueError) as error:
        raise ReplicaError(f"log-probabilities of an unknown form ({error!r:.100})") from error
    return check_logprobs(scores)


def read_likely(entry: Entry, count: int, vocab_size: int) -> dict[int, float]:
    """The likeliest tokens and their log-probabilities."""
    tokens = [likely.token_id for likely in entry.top_logprobs]
    if len(set(tokens)) != len(tokens) or len(tokens) != count:
        raise ReplicaError(f"{len(set(tokens))} likely tokens, where {count} were asked for")
    return dict(zip(tokens, read_logprobs(tokens, entry.top_logprobs, vocab_size), strict=True))


def read_top(entry: Entry, count: int, vocab_size: int) -> tuple[list[int], list[float]]:
    """The likeliest tokens at a place, the likeliest first, and their log-probabilities; -inf of those that had no chance.

    vLLM tells the sampled token before them, whatever its rank, and no more than were asked for: ask for one more.
    """
    told = sorted(entry.top_logprobs, key=lambda likely: likely.rank or MOST_TOKENS)[:count]
    tokens, logprobs = [likely.token_id for likely in told], [likely.logprob for likely in told]
    if len(set(tokens)) != count or not (min(tokens) >= 0 and max(tokens) < vocab_size):
        raise ReplicaError(f"likely tokens {tokens!r:.100}, where {count} of a vocabulary of {vocab_size} were asked for")
    chances = [logprob for logprob in logprobs if logprob > NO_LOGPROB]
    check_logprobs(chances)
    return tokens, [min(logprob, 0.0) if logprob > NO_LOGPROB else -math.inf for logprob in logprobs]


def error_message(answer: Any) -> str:
    """What an answer says of an error, cut to a length that fits a message."""
    error = answer.get("error", answer.get("detail", answer)) if isinstance(answer, dict) else answer
    text = error.get("message", error) if isinstance(error, dict) else error
    return str(text)[:500]
