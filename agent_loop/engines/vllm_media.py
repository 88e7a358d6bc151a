"""Images on their way into vLLM: opened, checked, and made part of a prompt."""

import asyncio
import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agent_loop.errors import RequestRefusedError


async def with_images(llm: Any, ids: list[int], images: Sequence[Any], max_tokens: int) -> Any:
    """What `AsyncLLM.generate` takes for this prompt and its images; they are read in a thread, and processed in one of vLLM.

    Raises:
        RequestRefusedError: something that is no image, images that do not fit the prompt, or no room for them and `max_tokens`.
    """
    from vllm.inputs import TokensPrompt

    opened = await asyncio.to_thread(all_opened, images)
    prompt = TokensPrompt(prompt_token_ids=ids, multi_modal_data={"image": opened})
    try:
        (given,) = await llm.renderer.render_cmpl_async([prompt])
    except Exception as error:
        # Whatever a model's own processor raises, assertions included.
        raise RequestRefusedError(
            f"the model's processor does not take {len(opened)} images with this prompt, which needs one image token for each: {error}"
        ) from error
    size, most = len(given["prompt_token_ids"]), int(llm.model_config.max_model_len)
    if size + max_tokens > most:
        raise RequestRefusedError(
            f"a prompt of {size} tokens, those of its images included, and max_tokens={max_tokens} exceed the model's length of {most}; "
            "use fewer or smaller images, or lower max_tokens"
        )
    return given


def all_opened(images: Sequence[Any]) -> list[Any]:
    """Pillow's own of each, or `RequestRefusedError`; reads files."""
    return [_opened(place, image) for place, image in enumerate(images)]


def _opened(place: int, image: Any) -> Any:
    from PIL import Image

    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, str | Path | bytes):
        raise RequestRefusedError(
            f"image {place} is {image!r:.60}; give one of Pillow, the path of a file, its bytes, or a data: URL of them"
        )
    try:
        with Image.open(_file(image)) as file:
            if file.format == "EPS":  # which Pillow has Ghostscript run
                raise ValueError("PostScript is a program; give pixels, such as PNG")
            return file.convert("RGB")
    except Exception as error:
        # Decoders raise what they like at a file that is cut short, or too large to be meant.
        raise RequestRefusedError(f"image {place} cannot be opened from {image!r:.120}: {error}") from error


def _file(image: str | Path | bytes) -> str | Path | io.BytesIO:
    """What Pillow opens: the path, or the bytes that were given themselves, or as RFC 2397 writes them."""
    if isinstance(image, bytes):
        return io.BytesIO(image)
    if not isinstance(image, str) or not image.startswith("data:"):
        if not Path(image).is_file():  # a pipe or a device may never come to an end
            raise FileNotFoundError("no regular file is there")
        return image
    head, _, data = image.partition(",")
    if not head.endswith(";base64"):
        raise ValueError("a data: URL of an image is in base64, data:image/png;base64,...")
    return io.BytesIO(base64.b64decode(data, validate=True))
