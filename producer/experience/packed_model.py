"""One transformers model, read over packed rows: each sequence sees itself only, and logits exist for a few tokens at a time."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Tensor = Any

MASKED_HERE = frozenset({"eager", "sdpa", "flex_attention"})
"""Attention that transformers gives a mask made from position ids; the others are told where sequences begin."""
LARGEST_DIFFERENCE = {torch.float32: 0.01, torch.float64: 0.01}
"""Of packed numbers to plain ones, relative to their spread; float32 may be multiplied in TF32. What a sequence sees of another one
changes them by more."""
DIFFERENCE_OF_HALF = 0.1


@dataclass(frozen=True)
class Row:
    """Sequences to be read in one pass, one behind the other.

    Attributes:
        ids: their tokens.
        lengths: of each.
        at: places in `ids` whose next token is asked for.
    """

    ids: NDArray[np.int64]
    lengths: tuple[int, ...]
    at: NDArray[np.int64]

    @property
    def targets(self) -> NDArray[np.int64]:
        """The tokens that follow those places."""
        return self.ids[self.at + 1]


AUTOCASTS = ("bfloat16", "float16")


def check_loaded(name: str, model: object) -> None:
    """Raises ValueError for a name of a model, or a class of models."""
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"{name}={model!r:.80} is not a loaded model; give one made by an AutoModelFor...from_pretrained(...)")


class PackedModel:
    """A causal language model, or a critic, without its head's cost for tokens that nobody asks for.

    The model may be wrapped by peft or DDP; its weights are whole, on one device or on several as transformers lays them out.
    """

    def __init__(self, model: Any, *, head: Any = None, autocast: str | None = None, logit_bytes: int = 128 << 20) -> None:
        """Look at the model; nothing is computed yet.

        Args:
            head: maps hidden states to logits or values; None: the model's own.
            autocast: "bfloat16" or "float16": computes as training under `torch.autocast` does. None: in the model's own type.
            logit_bytes: the most that logits may take at once, in float32.

        Raises:
            ValueError: the model has no such head, or no trunk that gives hidden states.
        """
        check_loaded("model", model)
        self.whole = model
        self.inner = unwrapped(model)
        self.trunk = getattr(self.inner, "base_model", self.inner)
        if self.trunk is self.inner:
            raise ValueError(f"{type(self.inner).__name__} is not a transformers model with a head; give one made by an AutoModelFor...")
        self.head = self.inner.get_output_embeddings() if head is None else head
        if self.head is None:
            raise ValueError(f"{type(self.inner).__name__} has no head for log-probabilities; give a causal language model")
        self.autocast = None if autocast is None else getattr(torch, autocast)
        self.logit_bytes = logit_bytes

    @property
    def device(self) -> Any:
        """Where tokens go in."""
        return self.inner.get_input_embeddings().weight.device

    @property
    def vocab_size(self) -> int:
        """Token ids lie in `range(vocab_size)`."""
        return int(self.inner.get_input_embeddings().weight.shape[0])

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Without gradients and without dropout; what was in training mode is so again afterwards."""
        training = [module for part in (self.inner, self.head) for module in part.modules() if module.training]
        kind = self.device.type
        casting: AbstractContextManager[Any] = nullcontext() if self.autocast is None else torch.autocast(kind, dtype=self.autocast)
        self.inner.eval()
        self.head.eval()
        try:
            with torch.no_grad(), casting:
                yield
        finally:
            for module in training:
                module.training = True

    def hidden(self, row: Row) -> Tensor:
        """(places, H) what the trunk makes of the tokens at `row.at`."""
        ids = torch.as_tensor(row.ids, device=self.device)
        starts = np.cumsum([0, *row.lengths])
        positions = np.arange(row.ids.size) - np.repeat(starts[:-1], row.lengths)
        out = self.trunk(
            input_ids=ids[None],
            attention_mask=None,  # with one, transformers would let sequences see each other
            position_ids=torch.as_tensor(positions, device=self.device)[None],
            use_cache=False,
            **self._boundaries(starts),
        )
        states = out.last_hidden_state[0]
        return states[torch.as_tensor(row.at, device=states.device)]

    def _boundaries(self, starts: NDArray[np.int64]) -> dict[str, Any]:
        """Where sequences begin, as flash attention's varlen functions take it."""
        if self.inner.config._attn_implementation in MASKED_HERE:
            return {}
        bounds = torch.as_tensor(starts, dtype=torch.int32, device=self.device)
        longest = int(np.diff(starts).max())
        return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, V) float32, as the model's own forward pass makes them."""
        made = self.head(hidden.to(self.head.weight.device)).float()
        config = self.inner.config.get_text_config()
        if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
            made *= scale
        if (scale := getattr(config, "logits_scaling", None)) is not None:  # Granite
            made /= scale
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
            made = made.div_(cap).tanh_().mul_(cap)
        return made

    def logprobs(self, hidden: Tensor, targets: NDArray[np.int64], temperature: float, *, entropy: bool) -> tuple[Tensor, Tensor | None]:
        """(n,) float32 of each target, and (n,) the entropies of what it was drawn from; on the model's device."""
        wanted = torch.as_tensor(targets, device=self.head.weight.device)
        a_row = (8 if entropy else 4) * self.head.weight.shape[0]  # entropies need logits and weights at once
        rows = max(1, self.logit_bytes // a_row)
        read = [
            _read(self.logits(hidden[start : start + rows]), wanted[start : start + rows], temperature, entropy)
            for start in range(0, len(wanted), rows)
        ]
        return torch.cat([one for one, _ in read]), torch.cat([other for _, other in read]) if entropy else None

    def values(self, hidden: Tensor) -> Tensor:
        """(n,) float32: the head's one number for each hidden state."""
        device = next(iter(self.head.parameters())).device
        return self.head(hidden.to(device)).float().reshape(len(hidden), -1)[:, 0]

    def check(self, *, causal: bool, packed: bool) -> None:
        """Reads a short sequence behind another one and alone, to see that the numbers are those of the model.

        Args:
            causal: whether its logits are compared with those of its own forward pass.
            packed: whether several sequences will be read in one row.

        Raises:
            ValueError: sequences see each other, or the model does something to its logits that is not known here.
        """
        first, second = (np.arange(count, dtype=np.int64) % self.vocab_size for count in (5, 7))
        second = second[::-1].copy()
        with self.reading():
            alone = self.hidden(Row(second, (7,), np.arange(7)))
            dtype = alone.dtype if self.autocast is None else self.autocast
            if packed:
                behind = self.hidden(Row(np.concatenate([first, second]), (5, 7), np.arange(5, 12)))
                self._compare(behind, alone, dtype, "lets packed sequences see each other", "pass packed=False")
            if causal:
                plain = self.inner(input_ids=torch.as_tensor(second, device=self.device)[None], use_cache=False).logits[0].float()
                why = "changes its logits in a way that is not known here"
                self._compare(self.logits(alone), plain, dtype, why, "attach log-probabilities that you computed yourself")

    def _compare(self, found: Tensor, expected: Tensor, dtype: Any, why: str, remedy: str) -> None:
        allowed = LARGEST_DIFFERENCE.get(dtype, DIFFERENCE_OF_HALF)
        spread = (expected - expected.mean(-1, keepdim=True)).float().norm()
        difference = float((found.to(expected.device) - expected).float().norm() / spread)
        if math.isnan(difference):
            raise ValueError(f"{type(self.inner).__name__} gives numbers that are not finite; its weights have diverged or are damaged")
        if not difference <= allowed:
            raise ValueError(
                f"{type(self.inner).__name__} {why}: numbers are off by {difference:.2g} of their spread, where rounding is below "
                f"{allowed}; {remedy}"
            )


def unwrapped(model: Any) -> Any:
    """The transformers model within what peft, DDP, `torch.compile` and TRL's value models make of it."""
    inner = model
    for name in ("_orig_mod", "module", "pretrained_model"):
        inner = inner.__dict__.get("_modules", {}).get(name, inner)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _read(logits: Tensor, targets: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities and entropies from logits, which are overwritten."""
    if temperature != 1.0:
        logits /= temperature
    logits -= logits.amax(-1, keepdim=True)
    chosen = logits.gather(-1, targets[:, None])[:, 0]
    if not entropy:
        return chosen - logits.exp_().sum(-1).log(), None
    weights = logits.exp()
    total = weights.sum(-1)
    # A token that is ruled out has a logit of minus infinity and a weight of 0, whose product is none. No third array is made.
    mean = weights.mul_(logits.clamp_(min=-1e4)).sum(-1) / total
    return chosen - total.log(), total.log() - mean
