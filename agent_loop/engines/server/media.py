"""Images on their way to a server, which opens and processes them: part of the request, without loss."""

import base64
import io
from collections.abc import Sequence
from typing import Any

from agent_loop.engines.server.answers import Piece
from agent_loop.engines.server.client import Server
from agent_loop.engines.server.faults import NoSuchEndpoint, ReplicaBusy, ReplicaError
from agent_loop.engines.vllm_media import all_opened
from agent_loop.errors import RequestRefusedError


def content_parts(images: Sequence[Any]) -> list[dict[str, str]]:
    """What a request tells of its images; reads files, and so runs in a thread.

    Raises:
        RequestRefusedError: something that is no image.
    """
    return [{"type": "image_url", "url": _png(image)} for image in all_opened(images)]


def _png(image: Any) -> str:
    written = io.BytesIO()
    image.convert("RGB").save(written, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"


async def check_taken(server: Server, images: int, error: ReplicaError) -> None:
    """Raise `RequestRefusedError` if it was the images that a server failed on.

    A model's processor raises what it likes, of which vLLM makes a 500; that the server is well tells this from its own failures.
    """
    if error.lost or isinstance(error, ReplicaBusy | NoSuchEndpoint):
        return
    await server.health()
    raise RequestRefusedError(
        f"the model's processor does not take {images} images with this prompt, which needs one image token for each: {error}"
    ) from error


def check_room(piece: Piece, max_tokens: int, most: int) -> None:
    """Raise `RequestRefusedError` if the prompt, now that its images are part of it, leaves no room for `max_tokens`."""
    if piece.prompt_size + max_tokens > most:
        raise RequestRefusedError(
            f"a prompt of {piece.prompt_size} tokens, those of its images included, and {max_tokens=} exceed the model's length of {most}; "
            "use fewer or smaller images, or lower max_tokens"
        )
