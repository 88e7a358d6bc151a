"""Images reach the model of a server, and in bfloat16 too log-probabilities are those of a forward pass; what is no image is refused."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from agent_loop.engines.vllm_server import VLLMServerEngine
from agent_loop.errors import RequestRefusedError
from agent_loop.sampling import SamplingParams
from examples.two_replicas import Replica
from tests.engines.test_vllm_images import BLUE, RED, expected, prompt_of
from tests.tiny_seeing_model import make_tiny_seeing_model

pytestmark = pytest.mark.timeout(600)
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True, seed=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_seeing_model(tmp_path_factory.mktemp("seeing"))


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engine(model: Path) -> AsyncIterator[VLLMServerEngine]:
    log = model.parent / "log"
    small = ("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16", "--enforce-eager")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        with Replica(model, *small, log=log) as replica:
            engine = VLLMServerEngine(replica.url, open_seconds=480.0)
            try:
                await engine.open()
            except BaseException:
                print(log.read_text()[-5000:])
                raise
            yield engine
            await engine.close()


async def test_logprobs_are_those_of_a_model_that_sees_the_images(engine: VLLMServerEngine, model: Path, tmp_path: Path) -> None:
    assert engine.capabilities.images
    RED.save(tmp_path / "red.png")
    cases: list[tuple[list[Any], list[Any]]] = [([RED], [RED]), ([BLUE], [BLUE]), ([tmp_path / "red.png", BLUE], [RED, BLUE])]
    async with asyncio.TaskGroup() as tasks:
        calls = [
            tasks.create_task(engine.generate(prompt_of(model, len(media)), PARAMS, request_id=f"see-{number}", media=media))
            for number, (media, _) in enumerate(cases)
        ]
    for call, (_, images) in zip(calls, cases, strict=True):
        response = call.result()
        np.testing.assert_allclose(response.logprobs, expected(model, images, response.token_ids.tolist()), atol=1e-3)
    red = calls[0].result()
    assert not np.allclose(red.logprobs, expected(model, [BLUE], red.token_ids.tolist()), atol=1e-2), "the image makes no difference"


@pytest.mark.parametrize(
    ("images", "media", "match"),
    [
        (1, ["no/such/file.png"], "image 0 cannot be opened"),
        (1, [7], "image 0 is 7"),
        (0, [RED], "one image token for each"),
        (1, [RED, BLUE], "one image token for each"),
        (31, [RED] * 31, "those of its images included"),
        (35, [RED] * 35, "maximum model length of 256"),
    ],
)
async def test_what_is_no_image_of_the_prompt_is_refused(
    engine: VLLMServerEngine, model: Path, images: int, media: Any, match: str
) -> None:
    with pytest.raises(RequestRefusedError, match=match):
        await engine.generate(prompt_of(model, images), PARAMS, request_id="bad", media=media)
    again = await engine.generate(prompt_of(model, 1), PARAMS, request_id="bad", media=[RED])
    assert len(again.token_ids) == 8


async def test_an_interrupt_reaches_a_request_whose_images_are_read(engine: VLLMServerEngine, model: Path) -> None:
    call = asyncio.create_task(engine.generate(prompt_of(model, 1), PARAMS, request_id="early", media=[RED]))
    await asyncio.sleep(0)
    await engine.interrupt()
    assert ((await call).finish_reason, len((await call).token_ids)) == ("abort", 0)
