"""From a model's text to the tool calls that it asks for: what is broken is told, and never run by guess."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agent_loop.strict_json import read_object

_OPEN, _CLOSE, _THOUGHT, _THOUGHT_ENDS = "<tool_call>", "</tool_call>", "<think>", "</think>"
_KEYS = {"name", "arguments"}
_FORM = f'write {_OPEN}{{"name": ..., "arguments": {{...}}}}{_CLOSE}'


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that a model asks for; whether there is such a tool, and whether it takes these arguments, is not known yet."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BadCall:
    """What claims to be a call and is none; `reason` is what the model is told."""

    reason: str


def tagged_calls(text: str) -> list[ToolCall | BadCall]:
    """The calls in `text` as Qwen's and Hermes' models write them: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

    Calls within thoughts (`<think>...</think>`) are not meant, and left out. A call is read whole or not at all: JSON that is broken or
    cut off, a key twice or unknown, numbers that are not finite, half a surrogate pair, or more than 32 levels make it a `BadCall`.
    """
    calls: list[ToolCall | BadCall] = []
    for body in _spoken(text).split(_OPEN)[1:]:
        inside, closed, _ = body.partition(_CLOSE)
        calls.append(_call(inside) if closed else BadCall(f"a tool call has no {_CLOSE}; {_FORM}"))
    return calls


def _spoken(text: str) -> str:
    """What is no thought; templates may have begun one before the text, and a model may not come to its end."""
    before, ends, after = text.partition(_THOUGHT_ENDS)
    return after if ends else before.partition(_THOUGHT)[0]


def _call(text: str) -> ToolCall | BadCall:
    try:
        return _checked(read_object(text.strip()))
    except ValueError as error:
        return BadCall(f"a tool call cannot be read: {error}; {_FORM}")


def _checked(call: dict[str, Any]) -> ToolCall:
    if unknown := sorted(call.keys() - _KEYS):
        raise ValueError(f"it has a key {unknown[0]!r:.60}")
    name, arguments = call.get("name"), call.get("arguments", {})
    if not isinstance(name, str) or not name:
        raise ValueError(f"its name is {name!r:.60}")
    if not isinstance(arguments, dict):
        raise ValueError(f"its arguments are {arguments!r:.60}, no mapping")
    return ToolCall(name, arguments)
