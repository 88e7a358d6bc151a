"""LoRA on top of a transformers model whose batches hold tokens of many requests: each token has its own request's adapter.

peft reads an adapter's configuration, and says which layers it changes and how much. It is applied here: peft picks an adapter by
the row of a batch, and the batches of continuous batching are one row, of all requests' tokens in line.
"""

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch.nn.functional import linear

from agent_loop.engines.adapters import Adapter
from agent_loop.engines.lora import WEIGHTS, LoraFolder, factor_names, read_lora


class Factors(NamedTuple):
    """What one layer adds to its output: `scaling` times the input times `down` [rank, in] and `up` [out, rank], both transposed."""

    down: torch.Tensor
    up: torch.Tensor
    scaling: float


Layers = Mapping[str, Factors]
"""Of each layer that an adapter changes, by its name."""


def load_layers(model: Any, attention: str, path: Any) -> Layers:
    """Read an adapter for `model`, which is not touched; `attention` is a kind that the model can be made with.

    Raises:
        ImportError: peft is not installed.
        ValueError: the folder holds no adapter that fits.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import Linear
    except ImportError as error:
        raise ImportError("TransformersEngine reads adapters with peft: pip install 'millrace[torch,adapters]'") from error
    folder = read_lora(path, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    shell = inject_adapter_in_model(LoraConfig.from_pretrained(str(folder.folder)), _shell(model, attention))
    output, found = model.get_output_embeddings(), dict[str, float]()
    for name, layer in shell.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        if not isinstance(layer, Linear) or layer.lora_variant or model.get_submodule(name) is output:
            raise ValueError(f"{folder.folder} changes {name}, a layer that this engine cannot adapt; leave it out of target_modules")
        ((adapter, rank),) = layer.r.items()
        if rank != folder.ranks.get(name):
            raise ValueError(
                f"{folder.folder} is of rank {rank} at {name} by its configuration, and its weights of {folder.ranks.get(name)}"
            )
        found[name] = float(layer.scaling[adapter])
    if missing := sorted(folder.ranks.keys() - found.keys()):
        raise ValueError(f"{folder.folder} has weights for {', '.join(missing[:3])}, which this model, or its target_modules, do not have")
    return {name: _factors(model, folder, name, scaling) for name, scaling in found.items()}


def _shell(model: Any, attention: str) -> Any:
    """A model of the same layers without weights, for peft to put its own into."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = attention
    with torch.device("meta"):
        return type(model)(config)


def _factors(model: Any, folder: LoraFolder, name: str, scaling: float) -> Factors:
    device, pair = model.get_submodule(name).weight.device, list[torch.Tensor]()
    with safe_open(folder.folder / WEIGHTS, framework="pt") as opened:
        for tensor in (opened.get_tensor(tensor_name) for tensor_name in factor_names(name)):
            if not tensor.isfinite().all():
                raise ValueError(f"{folder.folder} has weights for {name} that are not finite; they would make every response one of noise")
            # As peft does: half precision is for storing them.
            pair.append(tensor.to(device, torch.float32))
    return Factors(pair[0], pair[1], scaling)


class Overlays:
    """The adapters of one model, put on top of its layers by hooks; its weights and their names stay as they are.

    Only a thread that said what its tokens are under has adapters, and only then: whoever else shares the model sees the model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._adapters: dict[Adapter, Layers] = {}
        self._hooks: dict[str, Any] = {}
        self._here = threading.local()

    def put(self, adapter: Adapter, layers: Layers) -> None:
        """Have an adapter; no forward pass may be under way."""
        self._adapters[adapter] = layers
        for name in layers.keys() - self._hooks.keys():
            self._hooks[name] = self._model.get_submodule(name).register_forward_hook(_hook(self, name))

    def drop(self, adapter: Adapter) -> None:
        """Let an adapter go, at any time."""
        self._adapters.pop(adapter, None)

    def clear(self) -> None:
        """Give the model back as it was."""
        self._adapters.clear()
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()

    def line_up(self, tokens: Sequence[tuple[Adapter | None, int]]) -> None:
        """Say what the next forward pass on this thread computes: so many tokens under this adapter, so many under that."""
        self._here.size, self._here.parts = sum(count for _, count in tokens), []
        present = {adapter for adapter, _ in tokens if adapter is not None}
        for adapter in present:
            # Only a request that nobody waits for any more can be under one that was let go: it may run for a step after it was cancelled.
            if (layers := self._adapters.get(adapter)) is not None:
                self._here.parts.append((layers, _rows(adapter, tokens, self._model.device)))

    @contextmanager
    def under(self, adapter: Adapter | None, count: int) -> Iterator[None]:
        """All tokens of the forward pass in this block are under one adapter."""
        self.line_up([(adapter, count)])
        try:
            yield
        finally:
            self._here.parts = []

    def add_to(self, output: torch.Tensor, name: str, given: torch.Tensor) -> None:
        """Add to a layer's `output` what this thread's adapters make of its input `given`, in place."""
        for layers, rows in getattr(self._here, "parts", ()):
            if (factors := layers.get(name)) is not None:
                if given.shape[:-1] != (1, self._here.size):
                    raise ValueError(f"layer {name} sees {tuple(given.shape)}, not all tokens in line; leave it out of target_modules")
                # In the adapter's own precision, as peft does it.
                inner = linear(given[:, rows].to(factors.down.dtype), factors.down)
                output[:, rows] += linear(inner, factors.up) * factors.scaling


def _hook(overlays: Overlays, name: str) -> Any:
    def add(_: Any, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        overlays.add_to(output, name, given[0])

    return add


def _rows(adapter: Adapter, tokens: Sequence[tuple[Adapter | None, int]], device: Any) -> Any:
    """Where the tokens of an adapter are: what indexes them."""
    if all(other == adapter for other, _ in tokens):
        return slice(None)
    rows, start = list[int](), 0
    for other, count in tokens:
        if other == adapter:
            rows += range(start, start + count)
        start += count
    return torch.tensor(rows, device=device)
