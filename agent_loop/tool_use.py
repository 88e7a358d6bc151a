"""`ToolUseAgentLoop`: a conversation in which the model calls tools, as one list of tokens."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent_loop.arguments import at_least
from agent_loop.chat import Tokenizer, encode_chat
from agent_loop.engines.base import Engine
from agent_loop.errors import RequestRefusedError, ToolError
from agent_loop.rewards import Reward
from agent_loop.sampling import SamplingParams
from agent_loop.single_turn import SingleTurnAgentLoop
from agent_loop.tool_calls import BadCall, ToolCall, tagged_calls
from agent_loop.tools import Tool, tools_by_name
from buffer.rollout import RolloutState

_DUMMY = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
"""What results are rendered after, to see which tokens the template writes for them."""

_THREADS = 32
"""Calls of one loop that run at once; more wait, and their time does not run meanwhile."""


class ToolUseAgentLoop(SingleTurnAgentLoop):
    """Lets the model answer, runs the tools that it calls, tells it what they gave, and lets it answer again.

    Nothing that was sampled is encoded again: results are appended as the chat template writes them, with mask 0. A call that is
    broken, of no tool that there is, or with arguments that the tool does not take runs nothing: the model is told what is wrong, as it
    is told of a tool that fails or takes too long. The rollout goes on, and `metrics` count it.

    It ends where the model answers without a call ("stop"), or at `max_tokens`, at `max_turns`, or where a result leaves no room for an
    answer ("length"). Where it is interrupted while tools run, they are called again when it goes on: tools must bear that.

    A row is a chat, or text, which is the user's message; with `prompt_ids` the prompt must speak of the tools itself. To the messages of
    a chat the turns are added, as text. `metrics` has `tool_calls`, and of these `tool_errors`.

    Args:
        engine: which samples; turns end in its EOS, or in one of `sampling.stop_token_ids`.
        tokenizer: with a chat template that knows the role "tool".
        tools: functions with annotations and docstrings, or `Tool`s.
        reward: gives the score of a finished rollout.
        sampling: parameters for all prompts; `max_tokens` bounds all turns and results together.
        parse: the calls in the text of a turn.
        max_turns: answers of the model in a rollout.
        max_calls: of one answer; with more of them none is run.
        max_output: characters of one result; the rest is left out, and the model is told so.
        options: of `AgentLoop`.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        tools: Iterable[Tool | Callable[..., Any]],
        reward: Reward | None = None,
        *,
        sampling: SamplingParams | None = None,
        parse: Callable[[str], Sequence[ToolCall | BadCall]] = tagged_calls,
        max_turns: int = 8,
        max_calls: int = 8,
        max_output: int = 8192,
        **options: Any,
    ) -> None:
        super().__init__(engine, tokenizer, reward, sampling=sampling, **options)
        if tokenizer is None:
            raise TypeError("tool calls are read in text; pass a tokenizer with a chat template")
        self._tools = tools_by_name(tools)
        if not callable(parse):
            raise TypeError(f"parse={parse!r:.60} is no function of a text; give one, or leave it out")
        for name, bound in (("max_turns", max_turns), ("max_calls", max_calls), ("max_output", max_output)):
            at_least(name, bound, 1)
        self._parse, self._max_turns, self._max_calls, self._max_output = parse, max_turns, max_calls, max_output
        self._schemas = [tool.schema for tool in self._tools.values()]
        self._slots = asyncio.Semaphore(_THREADS)
        self._before: list[int] = []

    async def generate(self, state: RolloutState) -> RolloutState:
        """Answers and results in turn, continued where they were left."""
        if self._params(state, self.sampling).stop:
            raise RequestRefusedError("sampling.stop ends a turn in the middle of a token; name the tokens that end one as stop_token_ids")
        if state.prompt_ids is None:
            state.prompt_ids = self._encode(state)
        while True:
            reason = await self.extend(state)
            state.text = self._decode(state.response_ids, skip=True)
            answer = self._last_answer(state)
            calls = self._calls(answer) if reason == "stop" else []
            if not calls:
                break
            if sum(turn.role == "assistant" for turn in state.turns) >= self._max_turns:
                reason = "length"
                break
            if self.interrupted(state):  # as the answer ended: what calls waits off has passed
                reason = "abort"
                break
            results = await self._call_offs.unless_called_off(state.group_id, self._results(calls))
            messages = [{"role": "tool", "name": name, "content": content} for name, content, _ in results]
            ids = self.encode_results(state, messages)
            if state.response_ids.size + len(ids) >= self._params(state, self.sampling).max_tokens:
                reason = "length"
                break
            # Without an await between them: whoever stores the rollout sees all of a turn or nothing.
            state.append(ids, trainable=False)
            _say(state, {"role": "assistant", "content": answer}, *messages)
            _count(state, "tool_calls", len(results))
            _count(state, "tool_errors", sum(failed for _, _, failed in results))
        if reason != "abort":
            _say(state, {"role": "assistant", "content": answer})
        state.finish_reason = reason
        return state

    def encode_results(self, state: RolloutState, messages: Sequence[dict[str, Any]]) -> list[int]:
        """The tokens between the end of the model's answer and the beginning of its next, with these messages of tools between.

        They are what the template writes after an answer of another conversation. Override it for a template that cannot do that.

        Raises:
            RequestRefusedError: the template writes an answer otherwise once results follow, or nothing for them.
        """
        assert self.engine is not None
        before = self._before = self._before or self._render(_DUMMY, add_generation_prompt=False)
        both = self._render([*_DUMMY, *messages], add_generation_prompt=True)
        ended = self._answer_ends(before)
        if ended:
            # By counting: what stands before may differ, as where a template shows the thoughts of the last answer only.
            ends = [place for place, token in enumerate(both) if token in self.engine.eos_token_ids][ended - 1 : ended]
            kept = ends[0] + 1 if ends else 0
            fits = kept > 1 and both[kept - 2 : kept] == self._ending(before)
        else:
            kept = len(before)
            fits = both[:kept] == before
        if not fits or len(both) == kept:
            raise RequestRefusedError(
                "this chat template writes an answer otherwise once results of tools follow, so that they cannot be appended to what "
                "was sampled; give the tokenizer another, or override encode_results"
            )
        # Where another token than the template's ended the turn, the template's own comes too.
        unended = ended > 0 and int(state.response_ids[-1]) not in self.engine.eos_token_ids
        return both[kept - unended :]

    def _answer_ends(self, ids: list[int]) -> int:
        """Which EOS in `ids` ends the last answer, counted from 1; 0 where the template writes none there."""
        assert self.engine is not None
        ends = [place for place, token in enumerate(ids) if token in self.engine.eos_token_ids]
        return len(ends) if ends and not self._decode(np.asarray(ids[ends[-1] + 1 :], np.int32), skip=False).strip() else 0

    def _ending(self, ids: list[int]) -> list[int]:
        """The last token of the last answer, and the EOS after it."""
        assert self.engine is not None
        end = max(place for place, token in enumerate(ids) if token in self.engine.eos_token_ids)
        return ids[end - 1 : end + 1]

    def _encode(self, state: RolloutState) -> NDArray[np.int32]:
        messages = [{"role": "user", "content": state.prompt or ""}] if state.messages is None else state.messages
        return np.asarray(self._render(messages, add_generation_prompt=True), np.int32)

    def _render(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool) -> list[int]:
        tools = self._schemas or None
        return [int(token) for token in encode_chat(messages, self.tokenizer, tools=tools, add_generation_prompt=add_generation_prompt)]

    def _decode(self, ids: NDArray[np.int32], *, skip: bool) -> str:
        assert self.tokenizer is not None
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=skip)

    def _last_answer(self, state: RolloutState) -> str:
        """The text of the last turn, without the token that ended it; special tokens are shown, since calls may be marked by them."""
        assert self.engine is not None
        if not state.turns or state.turns[-1].role != "assistant":
            return ""
        ids = state.response_ids[state.turns[-1].start : state.turns[-1].end]
        return self._decode(ids[:-1] if int(ids[-1]) in self.engine.eos_token_ids else ids, skip=False)

    def _calls(self, answer: str) -> list[ToolCall | BadCall]:
        calls = list(self._parse(answer))
        if strange := [call for call in calls if not isinstance(call, ToolCall | BadCall)]:
            raise TypeError(f"parse gave {strange[0]!r:.80}; it must give ToolCall(name, arguments) or BadCall(reason) for each call")
        if len(calls) > self._max_calls:
            return [BadCall(f"{len(calls)} tool calls at once, of which none was run; make at most {self._max_calls}")]
        return calls

    async def _results(self, calls: Sequence[ToolCall | BadCall]) -> list[tuple[str, str, bool]]:
        """Of each call, in order: the tool's name, what the model is told, and whether it failed."""
        return [await self._result(call) for call in calls]

    async def _result(self, call: ToolCall | BadCall) -> tuple[str, str, bool]:
        if isinstance(call, BadCall):
            return "", self._told(f"error: {call.reason}"), True
        tool = self._tools.get(call.name)
        if tool is None:
            return "", self._told(f"error: there is no tool {call.name!r:.60}; there are {sorted(self._tools)}"), True
        try:
            async with self._slots:
                return tool.name, self._told(await tool.call(call.arguments)), False
        except ToolError as error:
            return tool.name, self._told(f"error: {error}"), True

    def _told(self, text: str) -> str:
        """A result as it goes into the prompt: of bounded length, encodable, and without what the template would take for its own."""
        if len(text) > self._max_output:
            text = f"{text[: self._max_output]}... ({len(text) - self._max_output} characters more)"
        text = text.encode(errors="replace").decode()
        marks = [*getattr(self.tokenizer, "added_tokens_encoder", ()), *getattr(self.tokenizer, "all_special_tokens", ())]
        # Runs of blanks are tokens of some models: no template marks turns by them, and indentation must stay.
        for mark in sorted({mark for mark in marks if len(mark) > 1 and not mark.isspace()}, key=len, reverse=True):
            text = text.replace(mark, f"{mark[0]} {mark[1:]}")
        return text


def _say(state: RolloutState, *messages: dict[str, Any]) -> None:
    if state.messages is not None:
        state.messages = [*state.messages, *messages]


def _count(state: RolloutState, name: str, n: int) -> None:
    state.metrics[name] = state.metrics.get(name, 0.0) + n
