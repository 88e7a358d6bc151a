"""What servers of reward models are asked and answer: `Wire`s between rollouts and JSON, without the network."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent_loop.arguments import at_least, function, mapping, text
from buffer.rollout import RolloutState
from buffer.rows import drawn_messages

Render = Callable[[RolloutState], str]
"""A rollout as the one text that a model judges."""


@dataclass(frozen=True, slots=True)
class Wire:
    """How rollouts become the body of a request, and its answer their scores.

    Attributes:
        encode: the body for rollouts, JSON-able.
        decode: the numbers from the decoded answer, of which nothing is sure, for `n` rollouts in order. It raises ValueError,
            LookupError or TypeError where the answer is none; what it gives is checked to be `n` finite numbers.
    """

    encode: Callable[[Sequence[RolloutState]], Any]
    decode: Callable[[Any, int], Sequence[Any]]

    def __post_init__(self) -> None:
        function("encode", self.encode, "one of rollouts")
        function("decode", self.decode, "one of (answer, n)")


def as_json(rollout: RolloutState) -> dict[str, Any]:
    """What a judge elsewhere sees of a rollout: prompt, messages, text, tokens, finish reason, row."""
    return {
        "rollout_id": rollout.rollout_id,
        "prompt": rollout.prompt,
        "messages": rollout.messages,
        "text": rollout.text,
        "response_ids": rollout.response_ids.tolist(),
        "finish_reason": rollout.finish_reason,
        "row": dict(rollout.row),
    }


def plain_text(rollout: RolloutState) -> str:
    """Prompt and response, one behind the other.

    Raises:
        ValueError: the prompt is a chat, whose template is not known here, or there is no text.
    """
    if rollout.messages is not None:
        raise ValueError("the prompt is a chat; pass render=, which makes a text of a rollout by the reward model's chat template")
    if rollout.text is None:
        raise ValueError("the rollout has no text; give the agent loop a tokenizer")
    return (rollout.prompt or "") + rollout.text


def rollouts_wire() -> Wire:
    """A server of your own: `{"rollouts": [{"prompt", "messages", "text", "row", ...}]}` to `{"scores": [...]}`."""
    return Wire(lambda rollouts: {"rollouts": [as_json(one) for one in rollouts]}, lambda answer, n: _field(answer, "scores"))


def openrlhf_wire(*, label: str = "label", render: Render = plain_text) -> Wire:
    """A reward server as OpenRLHF asks it: `query`, `prompts` and `labels` (a column of the row) to `rewards`."""

    text("label", label, "the name of a column")
    function("render", render, "one that makes a text of a rollout")

    def encode(rollouts: Sequence[RolloutState]) -> Any:
        prompts = [drawn_messages(one.row, one.messages) if one.prompt is None else one.prompt for one in rollouts]
        return {"query": [render(one) for one in rollouts], "prompts": prompts, "labels": [one.row.get(label) for one in rollouts]}

    return Wire(encode, lambda answer, n: _field(answer, "rewards"))


def vllm_wire(model: str, *, label: int = 0, render: Render = plain_text, options: Mapping[str, Any] | None = None) -> Wire:
    """vLLM's `/classify`, or `/pooling` for a reward model: a text each to the number at `label`.

    Args:
        model: the name under which it is served.
        label: which of the model's numbers is the score.
        render: makes a text of a rollout.
        options: more fields of the body, such as `{"use_activation": False}`.
    """

    text("model", model, "the name under which it is served")
    at_least("label", label, 0)
    function("render", render, "one that makes a text of a rollout")
    mapping("options", {} if options is None else options, "names of fields to their values")

    def encode(rollouts: Sequence[RolloutState]) -> Any:
        return {"model": model, "input": [render(one) for one in rollouts], **(options or {})}

    def decode(answer: Any, n: int) -> list[Any]:
        data = _field(answer, "data")
        by_index = {entry["index"]: entry for entry in data}
        if len(data) != n or sorted(by_index) != list(range(n)):
            raise ValueError(f"its data have the indices {sorted(by_index)!r:.60} for {n} rollouts")
        return [_list(by_index[index])[label] for index in range(n)]

    return Wire(encode, decode)


def _field(answer: Any, name: str) -> list[Any]:
    if not isinstance(answer, dict) or not isinstance(answer.get(name), list):
        raise ValueError(f"it has no list {name!r}")
    values: list[Any] = answer[name]
    return values


def _list(entry: Any) -> list[Any]:
    values = entry.get("probs", entry.get("data"))
    if not isinstance(values, list):
        raise ValueError("an entry of its data has neither probs nor data")
    return values
