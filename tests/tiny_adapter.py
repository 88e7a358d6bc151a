"""LoRA adapters for the tiny model, made on the spot with peft, and the model with one of them for reference."""

import functools
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def make_tiny_adapter(folder: Path, model: Path, *, seed: int, std: float = 0.1, **options: Any) -> Path:
    """Write an adapter of random weights, large enough to change what the model says."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]} | options)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
        for name, tensor in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(tensor, std=std)
    adapted.save_pretrained(folder)
    return folder


@functools.cache
def adapted_model(model: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as peft runs it with an adapter."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=dtype), adapter).eval()
