"""From a chat to token ids: messages checked, images and tool calls in them included, and put through a template."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from agent_loop.errors import RequestRefusedError
from agent_loop.strict_json import check_plain, read_object
from buffer.rows import parts_of


class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of transformers have it."""

    def encode(self, text: str) -> Sequence[int]:
        """Text to token ids."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Token ids to text."""

    def apply_chat_template(self, conversation: Any, *, add_generation_prompt: bool, tokenize: bool, return_dict: bool) -> Any:
        """Chat messages to token ids."""


class ChatTemplate(Protocol):
    """From a chat to token ids; tokenizers of transformers are such. `tools` is given where there are some."""

    def apply_chat_template(
        self, conversation: Any, *, tools: Any = None, add_generation_prompt: bool, tokenize: bool, return_dict: bool
    ) -> Any:
        """The ids of `conversation`, with the beginning of the answer."""


def template_of(template: Any, tokenizer: Any) -> ChatTemplate:
    """The template to use: the tokenizer's own for None, a jinja text, a class (made with the tokenizer) or an instance.

    Raises:
        ValueError: it has no `apply_chat_template`, or needs a tokenizer where there is none.
    """
    if template is None or isinstance(template, str):
        if not hasattr(tokenizer, "apply_chat_template"):
            raise ValueError("chats need a tokenizer with apply_chat_template, or a template; pass tokenizer=, or call set_template")
        return cast(ChatTemplate, tokenizer) if template is None else _OfTokenizer(tokenizer, template)
    made = cast(Any, template)(tokenizer) if inspect.isclass(template) else template
    if not hasattr(made, "apply_chat_template"):
        raise ValueError(f"template={template!r:.60} has no apply_chat_template; give a jinja text, or a class or an instance with one")
    return cast(ChatTemplate, made)


class _OfTokenizer:
    """The tokenizer with a jinja text in the place of its own template."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self._tokenizer, self._text = tokenizer, text

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        return self._tokenizer.apply_chat_template(conversation, **options, chat_template=self._text)


def encode_chat(
    messages: Any, tokenizer: Any, template: Any = None, *, tools: Any = None, add_generation_prompt: bool = True
) -> NDArray[Any]:
    """The token ids of a chat.

    Raises:
        RequestRefusedError: something in it is no message, or a part or a tool call of one that no template understands; the template
            fails; or what it gives are no token ids.
    """
    checked = checked_messages(messages)
    options = {} if tools is None else {"tools": _checked_tools(tools)}
    try:
        chat: Any = template_of(template, tokenizer)
        ids = chat.apply_chat_template(checked, **options, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False)
    except Exception as error:
        raise RequestRefusedError(f"the chat template failed: {error}") from error
    return flat_ids(ids)


def checked_messages(messages: Any) -> list[Any]:
    """The messages as a template takes them: the arguments of tool calls as mappings, also where they came as JSON text."""
    if not isinstance(messages, Iterable):
        raise RequestRefusedError(f"messages={messages!r:.60} is no chat; give a list of mappings with a role and a content")
    return [_checked(place, message) for place, message in enumerate(messages)]


def is_message(value: Any) -> bool:
    """Whether it is a mapping with a role."""
    return isinstance(value, Mapping) and "role" in value


def _checked(place: int, message: Any) -> Any:
    if not is_message(message):
        raise RequestRefusedError(f"{message!r:.60} is no chat message; give mappings with a role and a content")
    if kinds := {str(part.get("type")) for part in parts_of(message)} - {"text", "image"}:
        raise RequestRefusedError(
            f"a message holds parts of types {sorted(kinds)}; engines take text and images, "
            "{'type': 'image', 'image': an image of Pillow or a path}"
        )
    if message.get("tool_calls") is None:
        return message
    try:
        return {**message, "tool_calls": _checked_calls(message["tool_calls"])}
    except ValueError as error:
        raise RequestRefusedError(
            f"message {place} has a malformed tool call: {error}; "
            "give {'type': 'function', 'function': {'name': ..., 'arguments': a mapping, or one as JSON}}"
        ) from error


def _checked_calls(calls: Any) -> list[dict[str, Any]]:
    if not isinstance(calls, list | tuple):
        raise ValueError(f"tool_calls={calls!r:.60} is no list")
    return [_checked_call(call) for call in calls]


def _checked_call(call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise ValueError(f"{call!r:.60} names no function")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name:
        raise ValueError(f"its name is {name!r:.60}")
    if isinstance(arguments, str):
        try:
            arguments = read_object(arguments)
        except ValueError as error:
            raise ValueError(f"the arguments of {name:.60}, {arguments!r:.60}, are no JSON object: {error}") from error
    if arguments is not None and not isinstance(arguments, Mapping):
        raise ValueError(f"the arguments of {name:.60} are {arguments!r:.60}")
    check_plain(arguments)
    given = {**function, "arguments": dict(arguments or {})}
    return {**call, "function": given} if "function" in call else given


def _checked_tools(tools: Any) -> list[Any]:
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) or callable(tool) for tool in tools):
        raise RequestRefusedError(
            f"tools={tools!r:.60} is no list of tools; give JSON schemas, or functions with annotations and docstrings"
        )
    return list(tools)


def is_token(value: Any) -> bool:
    """Whether it is a whole number."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def flat_ids(given: Any) -> NDArray[Any]:
    """`given` as an array of one dimension, or `RequestRefusedError`."""
    try:
        ids = np.asarray(given)
    except ValueError as error:  # rows of unlike lengths
        raise RequestRefusedError(f"{given!r:.60} are no token ids; give one flat list of whole numbers for each input") from error
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise RequestRefusedError(f"{given!r:.60} are no token ids; give one flat list of whole numbers for each input")
    return ids
