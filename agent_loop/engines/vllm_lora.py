"""The adapters of a `VLLMEngine`: each a copy of its folder, from which vLLM may load it again at any time."""

import itertools
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open

from agent_loop.engines.adapters import Adapter
from agent_loop.engines.lora import CONFIG, WEIGHTS, read_lora

_NUMBERS = itertools.count(1)


class Staged(NamedTuple):
    """An adapter as requests name it to vLLM, and the folder that is its own."""

    request: Any
    folder: "tempfile.TemporaryDirectory[str]"


def stage(adapter: Adapter, path: Any, model: Mapping[str, tuple[int, ...]]) -> Staged:
    """Check an adapter and copy it: vLLM drops adapters that no request uses now, and loads them again later.

    By then a trainer may have written over the folder that was given.

    Raises:
        ValueError: the folder holds no adapter that fits.
    """
    from vllm.lora.request import LoRARequest

    given = read_lora(path, model)
    scratch = tempfile.TemporaryDirectory(prefix="millrace-adapter-", ignore_cleanup_errors=True)
    try:
        folder = Path(scratch.name)
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(given.folder / name, folder / name)
        read_lora(folder, model)  # the copy, which is what counts: the original may be written over right now
        _check_finite(folder / WEIGHTS, given.folder)
    except BaseException:
        scratch.cleanup()
        raise
    # vLLM keeps what it loaded by number, and blocks of the prefix cache by name and folder: none is ever used twice.
    return Staged(LoRARequest(str(adapter), next(_NUMBERS), scratch.name), scratch)


def _check_finite(file: Path, given: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  # no mapping
            if not opened.get_tensor(name).isfinite().all():
                raise ValueError(f"{given} has weights that are not finite ({name}); they would make every response one of noise")
