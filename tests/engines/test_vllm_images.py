"""Shows that images reach the model: log-probabilities are those of a forward pass with them, and what is no image is refused."""

import asyncio
import base64
import io
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, Idefics3ForConditionalGeneration

from agent_loop import Sampler, SamplingParams, SingleTurnAgentLoop
from agent_loop.engines.vllm import VLLMEngine
from agent_loop.engines.vllm_media import all_opened
from agent_loop.errors import RequestRefusedError
from buffer import ReplayBuffer, RolloutState, Status
from producer import ReplayPromptSampler
from tests.tiny_seeing_model import IMAGE, make_tiny_seeing_model

PARAMS = SamplingParams(max_tokens=8, ignore_eos=True, seed=1)
RED, BLUE = (Image.new("RGB", (40, 30), colour) for colour in ((255, 0, 0), (0, 0, 255)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_seeing_model(tmp_path_factory.mktemp("seeing"))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engine(model: Path) -> AsyncIterator[VLLMEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        async with VLLMEngine(model, dtype="float32", max_model_len=256, enforce_eager=True, max_num_seqs=16) as engine:
            yield engine


def prompt_of(model: Path, images: int) -> list[int]:
    text = "user: " + f"{IMAGE} " * images + "what?"
    ids: list[int] = AutoTokenizer.from_pretrained(model).encode(text)
    return ids


def expected(model: Path, images: Sequence[Image.Image], response: Sequence[int], text: str | None = None) -> NDArray[np.floating]:
    """Teacher-forced log-probabilities by transformers, whose processor makes the image tokens."""
    text = text or "user: " + f"{IMAGE} " * len(images) + "what?"
    given = AutoProcessor.from_pretrained(model)(text=text, images=[images], return_tensors="pt")
    ids = torch.cat([given["input_ids"], torch.tensor([response])], dim=1)
    with torch.inference_mode():
        seeing = Idefics3ForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
        logits = seeing(input_ids=ids, pixel_values=given["pixel_values"]).logits[0, -len(response) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0].numpy()


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


class Halts(SingleTurnAgentLoop):
    """Leaves a response after 6 tokens, as one that is interrupted there."""

    async def generate(self, state: RolloutState) -> RolloutState:
        state.prompt_ids = self._encode(state)
        await self.extend(state, self.sampling.replace(max_tokens=6))
        state.finish_reason = "abort"
        return state


async def test_logprobs_are_those_of_a_model_that_sees_the_images(engine: VLLMEngine, model: Path, tmp_path: Path) -> None:
    assert engine.capabilities.images
    RED.save(tmp_path / "red.png")
    cases: list[tuple[list[Any], list[Image.Image]]] = [([RED], [RED]), ([BLUE], [BLUE]), ([tmp_path / "red.png", BLUE], [RED, BLUE])]
    async with asyncio.TaskGroup() as tasks:
        calls = [
            tasks.create_task(engine.generate(prompt_of(model, len(media)), PARAMS, request_id=f"see-{number}", media=media))
            for number, (media, _) in enumerate(cases)
        ]
    for call, (_, images) in zip(calls, cases, strict=True):
        response = call.result()
        np.testing.assert_allclose(response.logprobs, expected(model, images, response.token_ids.tolist()), atol=1e-3)
    red, blue = calls[0].result(), calls[1].result()
    assert not np.allclose(red.logprobs, expected(model, [BLUE], red.token_ids.tolist()), atol=1e-2), "the image makes no difference"
    assert red.token_ids.tolist() != blue.token_ids.tolist()


async def test_an_interrupted_response_to_an_image_is_continued(engine: VLLMEngine, model: Path) -> None:
    long = PARAMS.replace(max_tokens=200)
    async with asyncio.TaskGroup() as tasks:
        began = asyncio.Event()
        call = tasks.create_task(
            engine.generate(prompt_of(model, 1), long, request_id="cut", media=[RED], on_tokens=lambda piece: began.set())
        )
        await began.wait()
        await engine.interrupt(["cut"])
    kept = call.result().token_ids.tolist()
    assert call.result().finish_reason == "abort"
    rest = await engine.generate([*prompt_of(model, 1), *kept], PARAMS, request_id="cut", media=[RED])
    both = np.concatenate([call.result().logprobs, rest.logprobs])
    np.testing.assert_allclose(both, expected(model, [RED], [*kept, *rest.token_ids.tolist()]), atol=1e-3)


async def test_an_agent_loop_trains_on_images_and_goes_on_with_them_from_the_database(
    engine: VLLMEngine, model: Path, tmp_path: Path
) -> None:
    RED.save(tmp_path / "red.png")
    parts = [{"type": "image", "image": str(tmp_path / "red.png")}, {"type": "image"}, {"type": "text", "text": "what?"}]
    row = {"messages": [{"role": "user", "content": parts}], "images": [data_url(BLUE)]}
    tokenizer, url = AutoTokenizer.from_pretrained(model), f"sqlite:///{tmp_path / 'run.db'}"
    async with ReplayBuffer.open(url) as buffer:
        group = await ReplayPromptSampler([row], buffer, group_size=2).sample()
        await buffer.put(await Halts(engine, tokenizer, sampling=PARAMS).generate_group(group))
        assert group.status is Status.INTERRUPTED
        assert [state.response_ids.size for state in group.rollouts] == [6, 6]
    async with ReplayBuffer.open(url) as buffer:
        again = await ReplayPromptSampler([row], buffer, group_size=2).sample()
        loop = SingleTurnAgentLoop(engine, tokenizer, reward=lambda state: 1.0, sampling=PARAMS.replace(max_tokens=12))
        await buffer.put(await loop.generate_group(again))
        (stored,) = await buffer.query(status=Status.COMPLETED)
    text = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
    assert text.count(IMAGE) == 2
    for before, state in zip(group.rollouts, stored.rollouts, strict=True):
        assert state.response_ids.size == 12
        assert state.response_ids[:6].tolist() == before.response_ids.tolist()
        wanted = expected(model, [RED, BLUE], state.response_ids.tolist(), text)
        np.testing.assert_allclose(state.logprobs, wanted, atol=1e-3)


async def test_an_interrupt_reaches_a_request_whose_images_are_looked_at(engine: VLLMEngine, model: Path) -> None:
    call = asyncio.create_task(engine.generate(prompt_of(model, 1), PARAMS, request_id="early", media=[RED]))
    await asyncio.sleep(0)  # it has come to its first wait, for the processor
    with pytest.raises(RequestRefusedError, match="in flight"):
        await engine.generate(prompt_of(model, 1), PARAMS, request_id="early", media=[RED])
    await engine.interrupt()
    assert ((await call).finish_reason, len((await call).token_ids)) == ("abort", 0)


@pytest.mark.parametrize(
    ("images", "media", "match"),
    [
        (1, ["no/such/file.png"], "image 0 cannot be opened"),
        (1, [b"GIF89a, and no more"], "image 0 cannot be opened"),
        (1, ["data:image/png,%89PNG"], "is in base64"),
        (1, [7], "image 0 is 7"),
        (0, [RED], "one image token for each"),
        (1, [RED, BLUE], "one image token for each"),
        (35, [RED] * 35, "those of its images included"),
    ],
)
async def test_what_is_no_image_of_the_prompt_is_refused(engine: VLLMEngine, model: Path, images: int, media: Any, match: str) -> None:
    with pytest.raises(RequestRefusedError, match=match):
        await engine.generate(prompt_of(model, images), PARAMS, request_id="bad", media=media)
    again = await engine.generate(prompt_of(model, 1), PARAMS, request_id="bad", media=[RED])
    assert len(again.token_ids) == 8


@pytest.mark.parametrize("image", [os.devnull, "/", "http://127.0.0.1:9/red.png", "file:///red.png", "red.png\0"])
def test_only_regular_files_are_opened(image: str) -> None:
    """A pipe or a device might never come to an end, and nothing is fetched."""
    with pytest.raises(RequestRefusedError, match=r"image 0 cannot be opened .* no regular file is there"):
        all_opened([image])


def test_a_program_is_no_image() -> None:
    """Rows may be of strangers, and Pillow would have Ghostscript run it."""
    file = io.BytesIO()
    RED.save(file, "EPS")
    with pytest.raises(RequestRefusedError, match="PostScript is a program"):
        all_opened([file.getvalue()])


async def test_a_sampler_takes_chats_with_images(engine: VLLMEngine, model: Path) -> None:
    sampler = Sampler(engine, AutoTokenizer.from_pretrained(model))
    chat = [{"role": "user", "content": [{"type": "image", "image": RED}, {"type": "text", "text": "what?"}]}]
    row = {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}], "images": [RED]}
    plain, (of_chat,), (of_row,) = [
        await sampler.sample(given, PARAMS, num_samples=2) for given in ([{"prompt_ids": [5, 6]}, [7, 8]], chat, row)
    ]
    assert len(plain) == 2
    assert of_chat.prompt_ids.tolist() == of_row.prompt_ids.tolist()
    first, second = [sequence.token_ids.tolist() for sequence in of_chat.sequences]
    assert first != second
    assert [sequence.token_ids.tolist() for sequence in of_row.sequences] == [first, second]
    blue = [{"role": "user", "content": [{"type": "image", "image": BLUE}, {"type": "text", "text": "what?"}]}]
    ((seen,), _) = [response.sequences for response in await sampler.sample([blue, blue], PARAMS)]
    assert seen.token_ids.tolist() != first
    for bad, match in [
        ({"messages": row["messages"]}, "not there"),
        ({**row, "images": [RED, BLUE]}, "belong to no part"),
        ({**row, "videos": ["a.mp4"]}, "videos"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "audio"),
    ]:
        with pytest.raises(RequestRefusedError, match=match):
            await sampler.sample(bad, PARAMS)  # type: ignore[arg-type]
    with pytest.raises(RequestRefusedError, match="prompt_logprobs"):
        await sampler.sample(chat, PARAMS, prompt_logprobs=True)
