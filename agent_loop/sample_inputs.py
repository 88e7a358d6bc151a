"""What a `Sampler` may be given, and how it becomes token ids: ids as they are, text encoded, chats through a template."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent_loop.chat import Tokenizer, encode_chat, flat_ids, is_message, is_token
from agent_loop.errors import RequestRefusedError
from buffer.rows import images_of

Input = Sequence[int] | NDArray[Any] | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""Token ids, a row with `prompt_ids`, `messages` (and `tools`) or `prompt`, or a list of chat messages."""

_WAYS = ("prompt_ids", "messages", "prompt")


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One input on its way: its token ids, the row that it came as, and its images in order."""

    ids: NDArray[Any]
    row: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[Any, ...] = ()


def as_list(inputs: Input | Sequence[Input]) -> list[Input]:
    """One or many inputs as a list of inputs. No inputs are `[]`; an empty prompt is `[[]]`."""
    if isinstance(inputs, str | bytes):
        raise RequestRefusedError(f"inputs={inputs!r:.60} is text; give token ids or a chat, or call generate_from_prompts")
    if isinstance(inputs, Mapping):
        return [inputs]
    if isinstance(inputs, np.ndarray) and inputs.ndim:
        return [inputs] if inputs.ndim == 1 else list(inputs)
    if not isinstance(inputs, Iterable) or getattr(inputs, "ndim", 1) == 0:
        raise RequestRefusedError(f"inputs={inputs!r:.60} is no input; give token ids, a row, a list of chat messages, or a list of those")
    listed: list[Any] = list(inputs)
    return [listed] if listed and (all(map(is_token, listed)) or all(map(is_message, listed))) else listed


def prompt_of(given: Any, tokenizer: Tokenizer | None, template: Any) -> Prompt:
    """The token ids of one input.

    Raises:
        RequestRefusedError: it is none of the known forms; the value and what to do are named.
    """
    if isinstance(given, Mapping):
        return Prompt(_ids_of_row(given, tokenizer, template), given, tuple(images_of(given.get("messages"), given) or ()))
    if isinstance(given, str | bytes):
        raise RequestRefusedError(f"{given!r:.60} is text; give token ids, {{'prompt': text}}, or call generate_from_prompts")
    if not isinstance(given, Sequence | np.ndarray) and not hasattr(given, "__array__"):
        raise RequestRefusedError(f"{given!r:.60} is no input; give token ids, a row or a list of chat messages")
    if isinstance(given, Sequence) and given and all(map(is_message, given)):
        return Prompt(encode_chat(given, tokenizer, template), {"messages": given}, tuple(images_of(given, {}) or ()))
    return Prompt(flat_ids(given))


def _ids_of_row(row: Mapping[str, Any], tokenizer: Tokenizer | None, template: Any) -> NDArray[Any]:
    named = [way for way in _WAYS if row.get(way) is not None]
    if not named:
        raise RequestRefusedError(f"a row with {sorted(row)} holds no prompt; give one of {_WAYS}")
    if others := [media for media in ("videos", "audios") if row.get(media)]:
        raise RequestRefusedError(f"the input holds {others}, and engines take images only; leave them out")
    if named[0] == "prompt_ids":
        return flat_ids(row["prompt_ids"])
    if named[0] == "messages":
        return encode_chat(row["messages"], tokenizer, template, tools=row.get("tools"))
    if not isinstance(row["prompt"], str):
        raise RequestRefusedError(f"prompt={row['prompt']!r:.60} is no text; give token ids as prompt_ids, a chat as messages")
    if tokenizer is None:
        raise RequestRefusedError("the input is text, and this sampler has no tokenizer; pass tokenizer=, or give token ids")
    return flat_ids(tokenizer.encode(row["prompt"]))
