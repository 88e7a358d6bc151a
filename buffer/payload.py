"""The arrays of a payload: raw little-endian numbers, then texts in UTF-8, never pickle. Their lengths stand in the extras.

Layout of `payloads.arrays`, each part for one member after the other: prompt_ids (int32, unless shared with a member before),
response_ids (int32), logprobs (float32), the versions' runs (int32 value, int32 length), loss_mask (uint8), text. What is
4 bytes wide comes first, so that it is aligned. Parts of one kind lie together, so that they are checked at once.

Files of schema 1 hold the first four member by member, and their text in the extras; these are put in order when read.
"""

import struct
import sys
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from buffer.errors import CorruptPayloadError
from buffer.repeated import repeated, repeats
from buffer.rollout import TOKEN_ARRAYS, RolloutState
from buffer.staleness import Timeline

if sys.byteorder != "little":
    raise ImportError("Millrace stores arrays little-endian and does not run on a big-endian machine")

_SHARED = -1
_KINDS = tuple(map(np.dtype, (np.int32, np.float32, np.uint8, np.int32, np.int32)))


class Response(NamedTuple):
    """What a payload's bytes hold of one member: arrays of one length, its prompt's ids and its text."""

    response_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    loss_mask: NDArray[np.uint8]
    versions: NDArray[np.int32]
    timelines: NDArray[np.int32]
    prompt_ids: NDArray[np.int32] | None = None
    text: str | None = None

    @classmethod
    def of(cls, rollout: RolloutState) -> "Response":
        """The rollout's own; raises `ValueError` where its arrays do not belong together, or its text is none."""
        ids, logprobs, mask = rollout.response_ids, rollout.logprobs, rollout.loss_mask
        versions, timelines = rollout.versions, rollout.timelines
        kinds = (ids.dtype, logprobs.dtype, mask.dtype, versions.dtype, timelines.dtype)
        if kinds != _KINDS or not ids.shape == logprobs.shape == mask.shape == versions.shape == timelines.shape == (len(ids),):
            raise ValueError(
                f"rollout {rollout.rollout_id}: its arrays are not int32, float32, uint8 and int32 of one length; "
                "tokens enter by append() and leave by reset() only"
            )
        if rollout.text is not None and not isinstance(rollout.text, str):
            raise ValueError(f"rollout {rollout.rollout_id}: text is {rollout.text!r:.100}; it must be text, or None")
        return cls(ids, logprobs, mask, versions, timelines, rollout.prompt_ids, rollout.text)

    def since(self, start: int) -> "Response":
        """Without the first `start` tokens, and without the prompt's ids if there are any such."""
        if start == 0:
            return self
        return self._replace(**{name: getattr(self, name)[start:] for name in TOKEN_ARRAYS}, prompt_ids=None)

    def continued(self, start: int, delta: "Response") -> "Response":
        """The first `start` tokens, then those of `delta`, with its text; from 0 on with its prompt's ids too."""
        if not 0 <= start <= self.response_ids.size:
            raise CorruptPayloadError(f"a prefix goes on at token {start} where {self.response_ids.size} are stored")
        if start == 0:
            return delta
        joined: dict[str, Any] = {name: np.concatenate([getattr(self, name)[:start], getattr(delta, name)]) for name in TOKEN_ARRAYS}
        for array in joined.values():
            array.flags.writeable = False
        return delta._replace(**joined, prompt_ids=self.prompt_ids)


class Span(NamedTuple):
    """The oldest and the newest version among a member's trainable tokens, plain and effective (see `buffer.staleness`)."""

    oldest: int
    newest: int
    oldest_effective: int
    newest_effective: int


class Runs(NamedTuple):
    """Runs of tokens of one version and timeline, of members one after the other; `bounds` says where each one's begin."""

    bounds: list[int]
    versions: list[int]
    timelines: list[int]
    lengths: list[int]
    trainable: list[bool]

    @classmethod
    def of(cls, responses: Sequence[Response]) -> "Runs":
        """Those of the responses, in order."""
        if (version := _only_version(responses)) is not None:
            return cls._of_one([response.versions.size for response in responses], version)
        versions = np.concatenate([response.versions for response in responses])
        timelines = np.concatenate([response.timelines for response in responses])
        mask = np.concatenate([response.loss_mask for response in responses])
        rewound = bool(timelines.any())
        if versions.size and not rewound and mask.min() and versions.min() == versions.max():
            return cls._of_one([response.versions.size for response in responses], int(versions[0]))
        bounds = [0, *accumulate(response.versions.size for response in responses)]
        total = bounds[-1]
        begins = np.zeros(total, np.bool_)
        np.not_equal(versions[1:], versions[:-1], out=begins[1:])
        if rewound:
            begins[1:] |= timelines[1:] != timelines[:-1]
        begins[[bound for bound in bounds if bound < total]] = True
        starts = np.flatnonzero(begins)
        return cls(
            np.searchsorted(starts, bounds).tolist(),
            versions[starts].tolist(),
            timelines[starts].tolist(),
            (np.append(starts[1:], total) - starts if total else starts).tolist(),
            (np.maximum.reduceat(mask, starts) == 1).tolist() if total else [],
        )

    @classmethod
    def _of_one(cls, sizes: Sequence[int], version: int) -> "Runs":
        """Those of responses whose tokens are all trainable, of one version and of timeline 0, as most groups' are."""
        lengths = [size for size in sizes if size]
        n = len(lengths)
        return cls([0, *accumulate(size > 0 for size in sizes)], [version] * n, [0] * n, lengths, [True] * n)

    def spans(self, timeline: Timeline) -> list[Span | None]:
        """Of each member, as `timeline` counts; None where nothing is trainable."""
        effective = self.versions
        if timeline.forks:
            effective = timeline.effective(np.array(self.versions, np.int64), np.array(self.timelines, np.int32)).tolist()
        known = list(zip(self.versions, effective, self.trainable, strict=True))
        return [_span(known[first:last]) for first, last in pairwise(self.bounds)]

    def of_timelines(self, member: int) -> list[list[int]]:
        """The (timeline, length) of one member's runs; empty where all are of timeline 0."""
        own = slice(self.bounds[member], self.bounds[member + 1])
        numbers = self.timelines[own]
        return list(map(list, zip(numbers, self.lengths[own], strict=True))) if any(numbers) else []

    def as_bytes(self) -> bytes:
        """The version and the length of each."""
        numbers = [number for pair in zip(self.versions, self.lengths, strict=True) for number in pair]
        return struct.pack(f"<{len(numbers)}i", *numbers)


def _only_version(responses: Sequence[Response]) -> int | None:
    """The version of all tokens where all are trainable and of timeline 0, and no array needs to be looked through to see it."""
    sampled = [response for response in responses if response.versions.size]
    if not sampled:
        return None
    version: int = sampled[0].versions.item(0)
    for response in sampled:
        if not (repeats(response.versions, version) and repeats(response.timelines, 0) and repeats(response.loss_mask, 1)):
            return None
    return version


def _span(runs: Sequence[tuple[int, int, bool]]) -> Span | None:
    if len(runs) == 1:
        ((version, effective, trainable),) = runs
        return Span(version, version, effective, effective) if trainable else None
    plain = [version for version, _, trainable in runs if trainable]
    if not plain:
        return None
    counted = [effective for _, effective, trainable in runs if trainable]
    return Span(min(plain), max(plain), min(counted), max(counted))


# -- to bytes ---------------------------------------------------------------------------------------------------


def pack(responses: Sequence[Response], runs: Runs, what: str) -> tuple[list[dict[str, Any]], bytes]:
    """The lengths of each response's parts, for the extras, and all parts as bytes.

    Raises `ValueError` naming `what` where an array holds what `unpack` would refuse: fields can be assigned to.
    """
    lengths: list[dict[str, Any]] = []
    prompts: list[bytes] = []
    texts: list[bytes] = []
    rewound = any(runs.timelines)
    for member, response in enumerate(responses):
        own: dict[str, Any] = {"n": response.response_ids.size, "runs": runs.bounds[member + 1] - runs.bounds[member]}
        if response.prompt_ids is not None:
            own["prompt_n"] = _add_prompt(response.prompt_ids.tobytes(), prompts)
        if response.text is not None:
            texts.append(response.text.encode(errors="surrogatepass"))
            own["text_n"] = len(texts[-1])
        if rewound and (timelines := runs.of_timelines(member)):
            own["timelines"] = timelines
        lengths.append(own)
    ids, logprobs = [response.response_ids for response in responses], [response.logprobs for response in responses]
    masks = [response.loss_mask for response in responses]
    pairs = runs.as_bytes()
    arrays = _joined([*prompts, *ids, *logprobs, pairs, *masks, *texts])
    at, n = sum(map(len, prompts)), sum(own["n"] for own in lengths)
    bad = "a version is negative" if min(runs.versions, default=0) < 0 or min(runs.timelines, default=0) < 0 else None
    if bad or (bad := _why_bad(*(np.frombuffer(arrays, *part) for part in _parts(at, n, len(pairs))))):
        raise ValueError(f"{what} cannot be stored: {bad}; tokens enter by append() and leave by reset() only")
    return lengths, arrays


def _parts(at: int, n: int, pairs: int) -> list[tuple[type[np.generic], int, int]]:
    """Where ids, log-probabilities and masks of `n` tokens lie, of what begins with `at` bytes: kind, number and offset."""
    return [(np.int32, n, at), (np.float32, n, at + 4 * n), (np.uint8, n, at + 8 * n + pairs)]


def _joined(parts: Sequence[Any]) -> bytes:
    try:
        return b"".join(parts)
    except TypeError:  # an array with gaps, such as a part of another
        return b"".join([part.tobytes() if isinstance(part, np.ndarray) else part for part in parts])


def _add_prompt(ids: bytes, prompts: list[bytes]) -> int:
    if prompts and ids == prompts[0]:
        return _SHARED
    prompts.append(ids)
    return len(ids) // 4


# -- from bytes -------------------------------------------------------------------------------------------------


def _is_length(value: Any) -> bool:
    return type(value) is int and value >= 0


class _Columns(NamedTuple):
    """The parts of one kind of all members together, read-only and not copied."""

    prompts: NDArray[np.int32]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    runs: NDArray[np.int32]
    mask: NDArray[np.uint8]
    texts: bytes


def unpack(extras: Sequence[Mapping[str, Any]], arrays: bytes) -> list[Response]:
    """The responses that `pack` made into these lengths and bytes.

    Raises `CorruptPayloadError` or another error of Python's where they contradict each other, never after an allocation
    larger than the bytes.
    """
    prompts, ids, logprobs, pairs, mask, texts = _columns(extras, arrays)
    if bad := _why_bad(ids, logprobs, mask):
        raise CorruptPayloadError(bad)
    runs, shared, responses = pairs.tolist(), None, []
    prompt_at = at = run_at = text_at = 0
    for extra in extras:
        prompt_ids, text, end, run_end = None, extra.get("text"), at + extra["n"], run_at + extra["runs"]
        if (prompt_n := extra.get("prompt_n")) is not None:
            if prompt_n != _SHARED:
                prompt_ids, prompt_at = prompts[prompt_at : prompt_at + prompt_n], prompt_at + prompt_n
                shared = prompt_ids if shared is None else shared
            elif (prompt_ids := shared) is None:
                raise CorruptPayloadError("a prompt is shared with no member")
        if (text_n := extra.get("text_n")) is not None:
            text, text_at = texts[text_at : text_at + text_n].decode("utf-8", "surrogatepass"), text_at + text_n
        versions = _expanded(runs[run_at:run_end], end - at)
        timelines = _expanded(extra["timelines"], end - at) if "timelines" in extra else repeated(0, end - at)
        responses.append(Response(ids[at:end], logprobs[at:end], mask[at:end], versions, timelines, prompt_ids, text))
        at, run_at = end, run_end
    return responses


def _columns(extras: Sequence[Mapping[str, Any]], arrays: bytes) -> _Columns:
    """The members' lengths, checked, say where each part lies."""
    prompts = n = runs = texts = 0
    first_schema = False
    for extra in extras:
        own_prompt, own_n, own_runs, own_text = extra.get("prompt_n"), extra["n"], extra["runs"], extra.get("text_n")
        if own_prompt is not None and (type(own_prompt) is not int or own_prompt != _SHARED):
            prompts += own_prompt if _is_length(own_prompt) else _refused(own_prompt)
        if own_text is not None:
            texts += own_text if _is_length(own_text) else _refused(own_text)
        n += own_n if _is_length(own_n) else _refused(own_n)
        runs += own_runs if _is_length(own_runs) else _refused(own_runs)
        first_schema = first_schema or "text" in extra
    width = prompts + 2 * n + 2 * runs
    if 4 * width + n + texts != len(arrays):
        raise CorruptPayloadError(f"a payload has {len(arrays)} bytes, its lengths say otherwise")
    if first_schema:
        arrays = _ordered(extras, arrays)
    words = np.frombuffer(arrays, np.int32, width)
    mask = np.frombuffer(arrays, np.uint8, n, 4 * width)
    ids, logprobs = words[prompts : prompts + n], words[prompts + n : prompts + 2 * n].view(np.float32)
    return _Columns(words[:prompts], ids, logprobs, words[prompts + 2 * n :].reshape(-1, 2), mask, arrays[4 * width + n :])


def _refused(length: Any) -> int:
    raise CorruptPayloadError(f"a length is {length!r:.100}")


def _ordered(extras: Sequence[Mapping[str, Any]], arrays: bytes) -> bytes:
    """A payload of schema 1, whose 4-byte parts lie member by member, with its parts of one kind together."""
    parts: list[list[bytes]] = [[], [], [], []]
    at = 0
    for extra in extras:
        sizes = (max(extra.get("prompt_n") or 0, 0), extra["n"], extra["n"], 2 * extra["runs"])
        for kind, size in zip(parts, sizes, strict=True):
            kind.append(arrays[at : at + 4 * size])
            at += 4 * size
    return b"".join([part for kind in parts for part in kind] + [arrays[at:]])


def _why_bad(ids: NDArray[Any], logprobs: NDArray[Any], mask: NDArray[Any]) -> str | None:
    """What `RolloutState` would refuse member by member, here of all together; None where it is fine."""
    if not ids.size:
        return None
    if (least := np.minimum.reduce(ids)) < 0:
        return f"a token id is {least}; they are 0 or more"
    if (most := np.maximum.reduce(mask)) > 1:
        return f"a mask holds {most}; it is 1 where trainable, else 0"
    finite = np.isfinite(logprobs)
    if not np.logical_and.reduce(finite) and not finite[mask == 1].all():
        return "a log-probability of a trainable token is not finite"
    return None


def _expanded(runs: Sequence[Sequence[int]], n: int) -> NDArray[np.int32]:
    """One value a token of `n`, read-only; refused where the runs (value, length) are not as long."""
    if len(runs) == 1:
        value, length = runs[0]
        if length == n and type(value) is type(length) is int and value >= 0 and n:
            return repeated(value, n)
    elif not runs and not n:
        return repeated(0, 0)
    # Before np.repeat: a forged length must not become an allocation.
    if sum(length for _, length in runs) != n or not all(_is_length(value) and _is_length(length - 1) for value, length in runs):
        raise CorruptPayloadError(f"runs {runs[:4]} do not cover {n} tokens")
    values: NDArray[np.int32] = np.repeat(np.array([value for value, _ in runs], np.int32), [length for _, length in runs])
    values.flags.writeable = False
    return values


NOTHING = Response.of(RolloutState(group_id=0, index=0))
"""Of a member of which nothing was stored."""
