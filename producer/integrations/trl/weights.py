"""The weights of a trainer's model, as an engine takes them."""

from typing import Any

from agent_loop.engines.base import WeightSource


def model_weights(model: Any) -> WeightSource:
    """The model's state dict, out of the wrapper of a parallel run.

    Raises:
        TypeError: the model has adapters of PEFT, whose names no engine knows.
    """
    plain = getattr(model, "module", model)
    if hasattr(plain, "peft_config"):
        raise TypeError("this model has adapters, whose tensors the engine does not know; pass weights= that gives a merged state dict")
    weights: WeightSource = plain.state_dict()
    return weights
