"""Agent loops show the engine their prompt's images at each request, across storage too; where it takes none, nothing is generated."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent_loop import AgentLoop, Capabilities, SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.base import Completion
from agent_loop.engines.simulated import SimulatedEngine
from buffer import Position, ReplayBuffer, RolloutGroup, RolloutState, Status
from buffer.rows import prompt_fields
from producer import PromptSampler, ReplayPromptSampler
from producer.errors import DatasetError
from producer.experience import make_experience
from tests.tiny_model import make_tiny_tokenizer

SAMPLING = SamplingParams(max_tokens=12, ignore_eos=True, seed=1)
URL = "data:image/png;base64,iVBORw0KGgo="
CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "image", "image": "b.png"}, {"type": "text", "text": "2+2?"}]}]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ '#' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}{% endfor %}"
    "{% if tools %}{{ tools | length }} tools\n{% endif %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def tokenizer_of_chats() -> Any:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class Seeing(SimulatedEngine):
    """Takes images, and writes down what it is shown; the first `cut` requests are ended early, after a token."""

    offers = Capabilities(images=True)

    def __init__(self, *, cut: int = 0) -> None:
        super().__init__(vocab_size=512)
        self.shown: list[tuple[list[int], Any]] = []
        self._cut = cut

    async def generate(self, prompt_ids: Any, params: SamplingParams, *, request_id: str, media: Any = None, **others: Any) -> Completion:
        self.shown.append((np.asarray(prompt_ids).tolist(), None if media is None else list(media)))
        if len(self.shown) <= self._cut:
            others["on_tokens"] = lambda piece: self._end([self._requests[request_id]], "abort")
        return await super().generate(prompt_ids, params, request_id=request_id, media=media, **others)


class LooksAgain(AgentLoop):
    """Answers, is given another image with two tokens, and answers once more."""

    async def generate(self, state: RolloutState) -> RolloutState:
        if not any(turn.role == "environment" for turn in state.turns):
            reason = await self.extend(state, self.sampling.replace(max_tokens=4))
            if reason == "abort":
                state.finish_reason = reason
                return state
            assert state.media is not None
            state.media.append("zoomed.png")
            state.append([40, 41], trainable=False)
        state.finish_reason = await self.extend(state)
        return state


async def test_images_are_shown_again_after_an_interruption_and_after_storage(tmp_path: Path) -> None:
    row = {"messages": CHAT, "images": ["a.png"], "answer": "4"}
    url, tokenizer = f"sqlite:///{tmp_path / 'run.db'}", tokenizer_of_chats()
    async with Seeing(cut=2) as engine:
        loop = SingleTurnAgentLoop(engine, tokenizer, sampling=SAMPLING)
        for expected in (Status.INTERRUPTED, Status.INTERRUPTED, Status.COMPLETED):
            async with ReplayBuffer.open(url) as buffer:
                group = await ReplayPromptSampler([row], buffer, group_size=1).sample("see")
                await buffer.put(await loop.generate_group(group))
                (stored,) = (await buffer.query())[0].rollouts
            assert (stored.status, stored.media, stored.messages) == (expected, ["a.png", "b.png"], CHAT)
    prompt = tokenizer.encode("user: ##2+2?assistant: ")
    assert [ids[: len(prompt)] for ids, _ in engine.shown] == [prompt] * 3
    assert [len(ids) - len(prompt) for ids, _ in engine.shown] == [0, 1, 2]
    assert [media for _, media in engine.shown] == [["a.png", "b.png"]] * 3


async def test_a_loop_of_several_turns_may_add_an_image_which_a_reset_takes_away_again(tmp_path: Path) -> None:
    row = {"prompt_ids": [1, 2], "media": [URL]}
    async with Seeing(cut=1) as engine, ReplayBuffer.open(f"sqlite:///{tmp_path / 'run.db'}") as buffer:
        loop = LooksAgain(engine, reward=lambda state: float(state.index), sampling=SAMPLING)
        for _ in range(2):
            group = await ReplayPromptSampler([row], buffer, group_size=2).sample("see")
            await buffer.put(await loop.generate_group(group))
        (stored,) = await buffer.query(status=Status.COMPLETED)
    assert [media for _, media in engine.shown] == [[URL], [URL], [URL, "zoomed.png"], [URL], [URL, "zoomed.png"]]
    assert [state.media for state in stored.rollouts] == [[URL, "zoomed.png"]] * 2
    experience = make_experience([stored], advantage="grpo")
    assert [experience.row_media(row) for row in range(2)] == [(URL, "zoomed.png")] * 2
    stored.rollouts[0].reset()
    assert stored.rollouts[0].media == [URL]


async def test_an_engine_without_images_and_a_chat_that_cannot_be_encoded_generate_nothing() -> None:
    engine = SimulatedEngine(vocab_size=512)
    chats: list[tuple[Any, str]] = [
        (CHAT, "2 images, and this SimulatedEngine takes none; leave them, or use an engine with capabilities.images"),
        ([{"role": "user", "content": [{"type": "video"}]}], "parts of types ['video']"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": "{broken"}}]}], "a malformed tool call"),
    ]
    async with engine:
        loop = SingleTurnAgentLoop(engine, tokenizer_of_chats(), sampling=SAMPLING)
        for place, (chat, reason) in enumerate(chats):
            row = {"messages": chat, "images": ["a.png"] if chat is CHAT else []}
            group = await loop.generate_group(RolloutGroup.from_row(place, row, group_size=2, task_name="see", position=Position(0, 0)))
            assert group.status is Status.FAILED
            for state in group.rollouts:
                assert (state.attempts, state.response_ids.size) == (1, 0)
                assert reason in str(state.error)


async def test_the_tools_of_a_row_reach_the_template() -> None:
    tokenizer, tools = tokenizer_of_chats(), [{"type": "function", "function": {"name": "add"}}]
    row = {"prompt": [{"role": "user", "content": "2+2?"}], "tools": tools}
    async with Seeing() as engine:
        loop = SingleTurnAgentLoop(engine, tokenizer, sampling=SAMPLING)
        await loop.generate_group(RolloutGroup.from_row(1, row, group_size=1, task_name="see", position=Position(0, 0)))
    ((ids, media),) = engine.shown
    assert (ids, media) == (tokenizer.encode("user: 2+2?1 tools\nassistant: "), None)
    sampler = PromptSampler([row], 1, max_prompt_tokens=len(ids) - 1, tokenizer=tokenizer)
    with pytest.raises(DatasetError, match=f"has {len(ids)} tokens"):
        await sampler.sample()


@pytest.mark.parametrize(
    ("row", "images"),
    [
        ({"prompt": "see", "images": ["a.png"]}, ["a.png"]),
        ({"prompt_ids": [1], "media": ("a.png",)}, ["a.png"]),
        ({"prompt": CHAT, "images": ["a.png"]}, ["a.png", "b.png"]),
        ({"messages": [{"role": "user", "content": None}], "images": None}, None),
        ({"prompt": "see", "images": []}, []),
    ],
)
def test_a_row_names_its_images_in_a_column_or_in_its_messages(row: Any, images: list[str] | None) -> None:
    assert prompt_fields(row)["media"] == images


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"images": "a.png"}, "images='a.png' is no list of images"),
        ({"images": 3}, "images=3 is no list of images"),
        ({"media": {"path": "a.png"}}, "is no list of images"),
        ({"images": ["a.png"], "media": ["a.png"]}, "two names of one thing"),
        ({"messages": CHAT}, "an image that is not there"),
        ({"messages": CHAT, "images": ["a.png", "b.png", "c.png"]}, "2 of the row's images belong to no part"),
        ({"images": [b"bytes"]}, "a value of type bytes is not JSON"),
    ],
)
async def test_a_row_whose_images_do_not_fit_is_bad(given: Any, reason: str) -> None:
    row = given if "messages" in given else {"prompt": "see", **given}
    with pytest.raises(DatasetError, match=reason):
        await PromptSampler([row], 1).sample()
