"""An experience as torch tensors; the only module of the experience stage that imports torch."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from producer.experience.arrays import Experience
    from producer.experience.losses import Reduction

OPTIONAL = ("reference_logprobs", "values", "returns", "trainer_logprobs", "importance")
NAMES = ("input_ids", "attention_mask", "position_ids", "loss_mask", "logprobs", "advantages", "versions", *OPTIONAL)
SHIFTED = ("shift_labels", "shift_mask", "shift_logprobs", "shift_advantages", *(f"shift_{name}" for name in OPTIONAL))


def to_torch(
    experience: "Experience",
    device: torch.device | str | None = None,
    reduction: "Reduction | None" = None,
    max_length: int | None = None,
) -> dict[str, torch.Tensor]:
    """The (N, T) arrays by name, copied to `device`; without `attention_mask` where it is packed, and without what it does not have."""
    tensors = {name: torch.tensor(array, device=device) for name in NAMES if (array := getattr(experience, name)) is not None}
    for name in SHIFTED:
        if (array := getattr(experience, name)) is not None:  # made for this call: nobody else has it
            tensors[name] = torch.from_numpy(array).to(device)
    if reduction is not None:
        weights = experience.shift_weights(reduction, max_length=max_length).astype(np.float32)
        tensors["shift_weights"] = torch.from_numpy(weights).to(device)
    return tensors


def varlen(experience: "Experience", row: int, device: torch.device | str | None = None) -> dict[str, Any]:
    """`cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k` of a row.

    Padding at the row's end is left out: the model is to be given `input_ids[row, :cu_seq_lens_q[-1]]`.
    """
    ends = torch.from_numpy(experience.layout.cu_seqlens(row)).to(device)
    longest = experience.layout.max_seqlen(row)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
