"""A model of transformers: loading one, what its configuration says, and what its logits say of tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as library_logging


def load_model(source: str | Path, dtype: str, tokenizer: Any) -> tuple[Any, Any]:
    """The model, without progress bars, and a tokenizer: the given one, else the folder's own where it has one."""
    bars = library_logging.is_progress_bar_enabled()
    library_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
        folder = Path(source)
        if tokenizer is None and (not folder.is_dir() or any(folder.glob("tokenizer*"))):
            tokenizer = AutoTokenizer.from_pretrained(source)
    finally:
        if bars:
            library_logging.enable_progress_bar()
    return model, tokenizer


def length_of(model: Any) -> int:
    """The most tokens of prompt and response together."""
    return int(model.config.get_text_config().max_position_embeddings)


def eos_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """Of the model's generation config, or else its config, and of the tokenizer."""
    named = model.generation_config.eos_token_id
    named = model.config.get_text_config().eos_token_id if named is None else named
    own = getattr(tokenizer, "eos_token_id", None)
    listed = [] if named is None else [named] if isinstance(named, int) else list(named)
    return frozenset(listed) | (frozenset() if own is None else {own})


def chosen(logits: torch.Tensor, tokens: Sequence[int]) -> list[float]:
    """Log-probabilities of `tokens` under `logits` [tokens, vocabulary]."""
    logprobs: list[float] = logits.float().log_softmax(-1).gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    return logprobs


def likeliest(logits: torch.Tensor, count: int) -> tuple[list[int], list[float]]:
    """The likeliest tokens under `logits` [vocabulary]; of equally likely ones the lowest ids."""
    logprobs, tokens = logits.float().log_softmax(-1).sort(descending=True, stable=True)
    return tokens[:count].tolist(), logprobs[:count].tolist()
