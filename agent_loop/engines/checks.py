"""What engines are asked, held against what can be asked at all: slips are told at once, with the value and what to give instead."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent_loop.errors import RequestRefusedError
from agent_loop.sampling import SamplingParams


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
