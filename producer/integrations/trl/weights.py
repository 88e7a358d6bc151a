"""The weights of a trainer's model, as an engine takes them."""

from typing import Any

from agent_loop.engines.base import WeightSource


def model_weights(model: Any) -> WeightSource:
    """The model's state dict, out of the wrapper of a parallel run; of a model with adapters of PEFT, with these merged in.

    Merging takes a copy of the weights. The model's own are afterwards what they were, to the bit.
    """
    plain = getattr(model, "module", model)
    weights: WeightSource = merged_weights(plain) if hasattr(plain, "merge_adapter") else plain.state_dict()
    return weights


def merged_weights(model: Any) -> dict[str, Any]:
    """Of a `PeftModel`: the tensors of the model beneath it, under their own names, with its active adapters merged in."""
    # Taking a delta off again rounds; without this, the base would drift a little with every update.
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if ".base_layer." in name}
    model.merge_adapter()
    try:
        return {_own_name(name): tensor.detach().clone() for name, tensor in model.state_dict().items() if _is_own(name, model.prefix)}
    finally:
        model.unmerge_adapter()
        now = model.state_dict()
        for name, tensor in before.items():
            now[name].copy_(tensor)


def _is_own(name: str, prefix: str) -> bool:
    """Whether a tensor is one of the model without adapters: neither theirs, nor the original of a module that is trained whole."""
    return prefix not in name and "original_module" not in name


def _own_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace("modules_to_save.default.", "")
