"""The adapters of a `VLLMEngine`: each a copy of its folder, from which vLLM may load it again at any time."""

import itertools
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

from agent_loop.engines.adapters import Adapter
from agent_loop.engines.lora import copied_lora

_NUMBERS = itertools.count(1)


class Staged(NamedTuple):
    """An adapter as requests name it to vLLM, and the folder that is its own."""

    request: Any
    folder: "tempfile.TemporaryDirectory[str]"


def stage(adapter: Adapter, path: Any, model: Mapping[str, tuple[int, ...]]) -> Staged:
    """Check an adapter and copy it: vLLM drops adapters that no request uses now, and loads them again later.

    Raises:
        ValueError: the folder holds no adapter that fits.
    """
    from vllm.lora.request import LoRARequest

    scratch = copied_lora(path, model)
    # vLLM keeps what it loaded by number, and blocks of the prefix cache by name and folder: none is ever used twice.
    return Staged(LoRARequest(str(adapter), next(_NUMBERS), scratch.name), scratch)
