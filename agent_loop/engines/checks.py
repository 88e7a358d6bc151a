"""What engines are asked, held against what can be asked at all: slips are told at once, with the value and what to give instead."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent_loop.engines.values import Capabilities
from agent_loop.errors import RequestRefusedError
from agent_loop.sampling import SamplingParams, whole


def flat_ids(given: Any) -> NDArray[Any]:
    """Token ids as one flat array of whole numbers, or `RequestRefusedError`."""
    try:
        ids = np.asarray(given)
    except (TypeError, ValueError):  # rows of unlike lengths, a tensor on a GPU
        ids = np.empty((0, 0))
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise RequestRefusedError(
            f"{given!r:.60} are no token ids; give one flat list or array of whole numbers, from the model's tokenizer"
        )
    return ids


def check_params(params: object) -> None:
    """Raise `RequestRefusedError` unless these are `SamplingParams`."""
    if not isinstance(params, SamplingParams):
        raise RequestRefusedError(f"params={params!r:.80} are no SamplingParams; give an object, SamplingParams(max_tokens=...)")


def check_call(request_id: object, session_id: object, on_tokens: object) -> None:
    """Raise `RequestRefusedError` unless a request has a name, and who is to see its tokens can be called."""
    if not isinstance(request_id, str) or not request_id:
        raise RequestRefusedError(f"request_id={request_id!r:.60} is no name; give a text of its own to every request in flight")
    if session_id is not None and not isinstance(session_id, str):
        raise RequestRefusedError(f"session_id={session_id!r:.60} is no text; give one to all requests of a rollout, or None")
    if on_tokens is not None and not callable(on_tokens):
        raise RequestRefusedError(f"on_tokens={on_tokens!r:.60} cannot be called; give a function of a Completion, or None")


def names_of(request_ids: Collection[str] | None) -> list[str] | None:
    """Which requests to interrupt, each once; None is all of them. `ValueError` for what holds no names: a text would be its letters."""
    if request_ids is None:
        return None
    if isinstance(request_ids, str | bytes | Mapping) or not isinstance(request_ids, Iterable):
        raise ValueError(f"request_ids={request_ids!r:.60} is no collection of request ids; give a list of them, or None for all")
    names = list(request_ids)
    if odd := [name for name in names if not isinstance(name, str)]:
        raise ValueError(f"request_ids holds {odd[0]!r:.60}, no request id; give the texts that generate was given, or None for all")
    return list(dict.fromkeys(names))


def check_source(source: object) -> None:
    """Raise `ValueError` for what cannot be weights, before anything is done with it."""
    if isinstance(source, bytes) or not isinstance(source, str | Path | Iterable) or source == "":
        raise ValueError(
            f"{source!r:.60} holds no weights; give a folder in Hugging Face's format, a state dict, (name, tensor) pairs, or a transfer "
            "where the engine takes one"
        )


_ONE_TOKEN = SamplingParams(max_tokens=1)


class Checks(ABC):
    """What `Engine` holds requests against: its own bounds."""

    @property
    @abstractmethod
    def max_length(self) -> int:
        """The most tokens of prompt and response together."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Token ids lie in `range(vocab_size)`."""

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this engine can do beyond what every engine must."""

    def check_score(self, token_ids: Sequence[int] | NDArray[np.int32], start: int) -> NDArray[np.int32]:
        """`token_ids` as int32 for `score`, or `RequestRefusedError`."""
        ids = self.check_request(token_ids, _ONE_TOKEN)
        if not 1 <= whole("start", start) < ids.size:
            raise RequestRefusedError(f"{start=} leaves nothing to score of {ids.size} tokens; it must be from 1 to {ids.size - 1}")
        return ids

    def check_top_tokens(self, token_ids: Sequence[int] | NDArray[np.int32], count: int) -> NDArray[np.int32]:
        """`token_ids` as int32 for `top_tokens`, or `RequestRefusedError`."""
        if not 1 <= whole("count", count) <= self.capabilities.top_tokens:
            raise RequestRefusedError(f"{count=} likely tokens; this engine gives from 1 to {self.capabilities.top_tokens}")
        return self.check_request(token_ids, _ONE_TOKEN)

    def check_request(self, prompt_ids: Sequence[int] | NDArray[np.int32], params: SamplingParams) -> NDArray[np.int32]:
        """`prompt_ids` as int32, or `RequestRefusedError` naming the value, the bound and what to do."""
        check_params(params)
        ids = flat_ids(prompt_ids)
        if ids.size == 0:
            raise RequestRefusedError("the prompt is empty; give at least one token")
        if outside := [int(token) for token in ids[(ids < 0) | (ids >= self.vocab_size)][:3]]:
            raise RequestRefusedError(f"token ids {outside} lie outside the vocabulary of {self.vocab_size}; was another tokenizer used?")
        if ids.size + params.max_tokens > self.max_length:
            raise RequestRefusedError(
                f"a prompt of {ids.size} tokens and max_tokens={params.max_tokens} exceed the model's length of "
                f"{self.max_length}; shorten the prompt or lower max_tokens"
            )
        if params.top_logprobs or params.structured_outputs is not None:
            self._check_extras(params)
        return ids.astype(np.int32)

    def check_media(self, media: Sequence[Any] | None) -> None:
        """Raise `RequestRefusedError` if there are images, and the engine takes none."""
        if media is not None and (isinstance(media, str | bytes | Mapping) or not isinstance(media, Sequence)):
            raise RequestRefusedError(f"media={media!r:.60} is no list of images; give one, in the order of the prompt, or None")
        if media and not self.capabilities.images:
            raise RequestRefusedError(
                f"{len(media)} images, and this {type(self).__name__} takes none; leave them, or use an engine with capabilities.images"
            )

    def _check_extras(self, params: SamplingParams) -> None:
        able, name = self.capabilities, type(self).__name__
        if params.structured_outputs is not None and not able.structured_outputs:
            raise RequestRefusedError(f"{name} has no structured_outputs; leave them, or use an engine with that capability")
        if params.top_logprobs > able.top_logprobs:
            raise RequestRefusedError(
                f"top_logprobs={params.top_logprobs} is more than the {able.top_logprobs} that {name} tells; ask for fewer, or use an "
                "engine with capabilities.top_logprobs"
            )
