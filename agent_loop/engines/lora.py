"""LoRA adapters on disk in peft's format: what a folder holds, and whether it is one that engines apply just as peft does."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent_loop.engines.checkpoint import header_shapes, not_finite

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."
_FACTORS = (".lora_A.weight", ".lora_B.weight")

# Each changes what an adapter computes, or the weights under it, beyond two factors a layer.
_BEYOND = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)
_INITS_OF_THE_MODEL = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class LoraFolder:
    """An adapter, by its configuration and the header of its weights; nothing is loaded.

    Attributes:
        folder: where it lies.
        ranks: of each layer, by the layer's name in the model that it was trained on.
        shapes: (out, in) of the layers.
    """

    folder: Path
    ranks: Mapping[str, int]
    shapes: Mapping[str, tuple[int, int]]


def read_lora(path: Any, model: Mapping[str, tuple[int, ...]]) -> LoraFolder:
    """What the folder holds, checked against the shapes of the model's tensors, by name; of names that are not there nothing is asked.

    Raises:
        ValueError: not a folder of a LoRA adapter, cut off, of another kind than plain LoRA, or of a model with other shapes.
    """
    if not isinstance(path, str | Path):
        raise ValueError(f"{path!r:.80} is no folder; give one that peft's save_pretrained wrote")
    folder = Path(path).absolute()
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}; save the adapter with peft's save_pretrained")
    _check_config(folder)
    ranks, shapes = _layers(folder, header_shapes(folder / WEIGHTS))
    for name, (out, into) in shapes.items():
        own = model.get(f"{name}.weight")
        if own is not None and own not in ((out, into), (into, out)):
            raise ValueError(f"{folder} was made for another model: {name} is {(out, into)} there, and {own} in this one")
    return LoraFolder(folder, ranks, shapes)


def copied_lora(path: Any, model: Mapping[str, tuple[int, ...]], parent: str | Path | None = None) -> "tempfile.TemporaryDirectory[str]":
    """A checked copy of an adapter in a folder of its own, in `parent` or the temporary folder.

    Engines that load adapters again later load the copy: by then a trainer may have written over the folder that was given.

    Raises:
        ValueError: see `read_lora`; or its weights are not finite.
    """
    given = read_lora(path, model)
    scratch = tempfile.TemporaryDirectory(prefix="millrace-adapter-", dir=parent, ignore_cleanup_errors=True)
    try:
        folder = Path(scratch.name)
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(given.folder / name, folder / name)
        read_lora(folder, model)  # the copy, which is what counts: the original may be written over right now
        if (spoilt := not_finite(folder / WEIGHTS)) is not None:
            raise ValueError(f"{given.folder} has weights that are not finite ({spoilt}); they would make every response one of noise")
    except BaseException:
        scratch.cleanup()
        raise
    return scratch


def factor_names(layer: str) -> list[str]:
    """What the two factors of a layer are called in the file of weights: the one that is applied first, and the other."""
    return [f"{_PREFIX}{layer}{end}" for end in _FACTORS]


def _check_config(folder: Path) -> None:
    try:
        config = json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} does not parse: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{folder} is an adapter of kind {kind!r}; engines apply LORA")
    found = [name for name in _BEYOND if config.get(name)]
    if config.get("bias", "none") != "none":
        found.append("bias")
    if str(config.get("init_lora_weights")).lower().startswith(_INITS_OF_THE_MODEL):
        found.append("init_lora_weights")
    if found:
        settings = ", ".join(f"{name}={config[name]!r:.40}" for name in found)
        raise ValueError(
            f"{folder} is more than plain LoRA ({settings}); train it without, or merge it into the model and use update_weights"
        )


def _layers(folder: Path, tensors: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    ranks, shapes = dict[str, int](), dict[str, tuple[int, int]]()
    for name in sorted(tensors):
        layer = name.removeprefix(_PREFIX)
        for end in _FACTORS:
            layer = layer.removesuffix(end)
        down, up = (tensors.get(factor) for factor in factor_names(layer))
        if down is None or up is None or name not in factor_names(layer):
            raise ValueError(f"{folder / WEIGHTS} holds {name}, which is none of the two factors of a layer; was saving cut short?")
        if (len(down), len(up)) != (2, 2) or down[0] != up[1]:
            raise ValueError(f"{folder / WEIGHTS} holds factors of {layer} with shapes {down} and {up}, which do not fit each other")
        ranks[layer], shapes[layer] = down[0], (up[0], down[1])
    if not ranks:
        raise ValueError(f"{folder / WEIGHTS} is empty; save the adapter with peft's save_pretrained")
    return ranks, shapes
