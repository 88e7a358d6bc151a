"""An experience as torch tensors; the only module of the experience stage that imports torch."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from producer.experience.arrays import Experience

OPTIONAL = ("reference_logprobs", "values", "returns", "trainer_logprobs", "importance")
NAMES = ("input_ids", "attention_mask", "position_ids", "loss_mask", "logprobs", "advantages", "versions", *OPTIONAL)
SHIFTED = ("shift_labels", "shift_mask", "shift_logprobs", "shift_advantages", *(f"shift_{name}" for name in OPTIONAL))


def to_torch(experience: "Experience", device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
    """The (N, T) arrays by name, copied to `device`; without `attention_mask` where it is packed, and without what it does not have."""
    arrays = {name: getattr(experience, name) for name in NAMES + SHIFTED}
    return {name: torch.tensor(array, device=device) for name, array in arrays.items() if array is not None}
