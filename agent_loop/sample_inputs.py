"""What a `Sampler` may be given, and how it becomes token ids: ids as they are, text encoded, chats through a template."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from agent_loop.errors import RequestRefusedError
from agent_loop.single_turn import Tokenizer

Input = Sequence[int] | NDArray[Any] | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""Token ids, a row with `prompt_ids`, `messages` (and `tools`) or `prompt`, or a list of chat messages."""

_WAYS = ("prompt_ids", "messages", "prompt")


class ChatTemplate(Protocol):
    """From a chat to token ids; tokenizers of transformers are such."""

    def apply_chat_template(
        self, conversation: Any, *, tools: Any = None, add_generation_prompt: bool, tokenize: bool, return_dict: bool
    ) -> Any:
        """The ids of `conversation`, with the beginning of the answer."""


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
    return [listed] if listed and (all(map(_is_token, listed)) or all(map(_is_message, listed))) else listed


def _is_token(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value


def template_of(template: Any, tokenizer: Any) -> ChatTemplate:
    """The template to use: the tokenizer's own for None, a jinja text, a class (made with the tokenizer) or an instance.

    Raises:
        ValueError: it has no `apply_chat_template`, or needs a tokenizer where there is none.
    """
    if template is None or isinstance(template, str):
        if not hasattr(tokenizer, "apply_chat_template"):
            raise ValueError("chats need a tokenizer with apply_chat_template, or a template; pass tokenizer=, or call set_template")
        return _OfTokenizer(tokenizer, template)
    made = cast(Any, template)(tokenizer) if inspect.isclass(template) else template
    if not hasattr(made, "apply_chat_template"):
        raise ValueError(f"template={template!r:.60} has no apply_chat_template; give a jinja text, or a class or an instance with one")
    return cast(ChatTemplate, made)


class _OfTokenizer:
    """The tokenizer's template, or a jinja text in its place."""

    def __init__(self, tokenizer: Any, text: str | None) -> None:
        self._tokenizer, self._options = tokenizer, {} if text is None else {"chat_template": text}

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        return self._tokenizer.apply_chat_template(conversation, **options, **self._options)


def prompt_of(given: Any, tokenizer: Tokenizer | None, template: Any) -> Prompt:
    """The token ids of one input.

    Raises:
        RequestRefusedError: it is none of the known forms; the value and what to do are named.
    """
    if isinstance(given, Mapping):
        return Prompt(_ids_of_row(given, tokenizer, template), given, _images(given.get("messages"), given))
    if isinstance(given, str | bytes):
        raise RequestRefusedError(f"{given!r:.60} is text; give token ids, {{'prompt': text}}, or call generate_from_prompts")
    if not isinstance(given, Sequence | np.ndarray) and not hasattr(given, "__array__"):
        raise RequestRefusedError(f"{given!r:.60} is no input; give token ids, a row or a list of chat messages")
    if isinstance(given, Sequence) and given and all(map(_is_message, given)):
        return Prompt(_ids_of_chat(given, None, tokenizer, template), {"messages": given}, _images(given, {}))
    return Prompt(_ids(given))


def _ids_of_row(row: Mapping[str, Any], tokenizer: Tokenizer | None, template: Any) -> NDArray[Any]:
    named = [way for way in _WAYS if row.get(way) is not None]
    if not named:
        raise RequestRefusedError(f"a row with {sorted(row)} holds no prompt; give one of {_WAYS}")
    if others := [media for media in ("videos", "audios", "media") if row.get(media)]:
        raise RequestRefusedError(f"the input holds {others}, and engines take images only; leave them out")
    if named[0] == "prompt_ids":
        return _ids(row["prompt_ids"])
    if named[0] == "messages":
        return _ids_of_chat(row["messages"], row.get("tools"), tokenizer, template)
    if not isinstance(row["prompt"], str):
        raise RequestRefusedError(f"prompt={row['prompt']!r:.60} is no text; give token ids as prompt_ids, a chat as messages")
    if tokenizer is None:
        raise RequestRefusedError("the input is text, and this sampler has no tokenizer; pass tokenizer=, or give token ids")
    return _ids(tokenizer.encode(row["prompt"]))


def _ids_of_chat(messages: Any, tools: Any, tokenizer: Tokenizer | None, template: Any) -> NDArray[Any]:
    if not isinstance(messages, Iterable):
        raise RequestRefusedError(f"messages={messages!r:.60} is no chat; give a list of mappings with a role and a content")
    for message in messages:
        if not _is_message(message):
            raise RequestRefusedError(f"{message!r:.60} is no chat message; give mappings with a role and a content")
        if kinds := {str(part.get("type")) for part in _parts(message)} - {"text", "image"}:
            raise RequestRefusedError(
                f"a message holds parts of types {sorted(kinds)}; engines take text and images, "
                "{'type': 'image', 'image': an image of Pillow or a path}"
            )
    try:
        chat: Any = template_of(template, tokenizer)
        ids = chat.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False)
    except Exception as error:
        raise RequestRefusedError(f"the chat template failed: {error}") from error
    return _ids(ids)


def _parts(message: Any) -> list[Mapping[str, Any]]:
    content = message.get("content")
    return [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []


def _images(messages: Any, row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Those of the messages' parts; a part without one has the next of the row's `images`."""
    if not isinstance(row.get("images") or (), Iterable):
        raise RequestRefusedError(f"images={row['images']!r:.60} is no list of images; give one, in the order of the prompt")
    rest, found = list(row.get("images") or ()), list[Any]()
    parts = [part for message in messages or () if isinstance(message, Mapping) for part in _parts(message)]
    for part in (part for part in parts if part.get("type") == "image"):
        if part.get("image") is None and not rest:
            raise RequestRefusedError("a message speaks of an image that is not there; give it as part['image'], or in the row's images")
        found.append(rest.pop(0) if part.get("image") is None else part["image"])
    if rest and found:
        raise RequestRefusedError(
            f"{len(rest)} of the row's images belong to no part of its messages; give a part of type 'image' for each"
        )
    return tuple(found or rest)


def _ids(given: Any) -> NDArray[Any]:
    try:
        ids = np.asarray(given)
    except ValueError as error:  # rows of unlike lengths
        raise RequestRefusedError(f"{given!r:.60} are no token ids; give one flat list of whole numbers for each input") from error
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise RequestRefusedError(f"{given!r:.60} are no token ids; give one flat list of whole numbers for each input")
    return ids
