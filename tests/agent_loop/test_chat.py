"""Tool calls in a chat reach its template as mappings, and one that is malformed is refused before anything is generated."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_loop import Sampler, SamplingParams
from agent_loop.chat import checked_messages
from agent_loop.engines.simulated import SimulatedEngine
from agent_loop.errors import RequestRefusedError
from agent_loop.strict_json import DEEPEST, read_object
from tests.tiny_model import make_tiny_tokenizer


def called(**function: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "id": "1", "function": function}]}


deep = json.dumps({"a": 1})
for _ in range(DEEPEST):
    deep = f'{{"a": {deep}}}'

MALFORMED: list[tuple[Any, str]] = [
    (called(name="add", arguments='{"a": 1'), "the arguments of add, .* are no JSON object"),
    (called(name="add", arguments="[1]"), "it is a list, not a mapping"),
    (called(name="add", arguments='{"a": 1, "a": 2}'), "the key 'a' stands twice"),
    (called(name="add", arguments='{"a": NaN}'), "NaN is no finite number"),
    (called(name="add", arguments='{"a": 1e999}'), "1e999 is no finite number"),
    (called(name="add", arguments='{"a": "\\ud800"}'), "half a surrogate pair"),
    (called(name="add", arguments=deep), f"nested deeper than {DEEPEST} levels"),
    (called(name="add", arguments="[" * 200_000), "nested deeper|Expecting value"),
    (called(name="add", arguments={"a": {"b": "\udfff"}}), "half a surrogate pair"),
    (called(name="add", arguments=7), "the arguments of add are 7"),
    (called(name="", arguments={}), "its name is ''"),
    (called(arguments={}), "its name is None"),
    ({"role": "assistant", "tool_calls": ["add(1)"]}, "'add\\(1\\)' names no function"),
    ({"role": "assistant", "tool_calls": {"name": "add"}}, "is no list"),
]


@pytest.mark.parametrize(("message", "reason"), MALFORMED)
def test_a_malformed_tool_call_is_refused_with_its_message(message: Any, reason: str) -> None:
    with pytest.raises(RequestRefusedError, match=f"message 1 has a malformed tool call: .*{reason}.*; give"):
        checked_messages([{"role": "user", "content": "2+2?"}, message])


async def test_a_sampler_refuses_it_before_anything_is_generated() -> None:
    async with SimulatedEngine(vocab_size=512) as engine:
        sampler = Sampler(engine, make_tiny_tokenizer())
        chat = [{"role": "user", "content": "2+2?"}]
        with pytest.raises(RequestRefusedError, match="input 1: message 1 has a malformed tool call"):
            await sampler.sample([chat, [*chat, MALFORMED[0][0]]], SamplingParams(max_tokens=2))
        with pytest.raises(RequestRefusedError, match="tools='add' is no list of tools"):
            await sampler.sample({"messages": chat, "tools": "add"}, SamplingParams(max_tokens=2))


def test_arguments_reach_the_template_as_a_mapping_however_they_came() -> None:
    for arguments in ('{"a": 1, "b": "\\u0000"}', {"a": 1, "b": "\0"}):
        (message,) = checked_messages([called(name="add", arguments=arguments)])
        assert message["tool_calls"] == [{"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": 1, "b": "\0"}}}]
    (flat,) = checked_messages([{"role": "assistant", "tool_calls": [{"name": "now"}]}])
    assert flat["tool_calls"] == [{"name": "now", "arguments": {}}]
    plain = [{"role": "user", "content": "2+2?", "tool_calls": None}]
    assert checked_messages(plain) == plain


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), VALUES, max_size=4))
def test_what_is_read_is_what_was_written(value: dict[str, Any]) -> None:
    assert read_object(json.dumps(value)) == value


@given(st.text() | st.text('{}[]",:0123456789.eE-\\utrufalsn '))
def test_any_text_is_read_or_refused_with_a_reason(text: str) -> None:
    with suppress(ValueError):  # and nothing else is raised
        assert read_object(text) == json.loads(text)
