"""A tiny causal language model and its tokenizer, made on the spot: tests and benchmarks need no download."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification, Qwen2Tokenizer

EOS = "<|eos|>"
PAD = "<|pad|>"
VOCAB_SIZE = 512
MAX_LENGTH = 512

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tiny_model(folder: str | Path, *, dtype: str = "float32", seed: int = 0) -> Path:
    """Write a Qwen2 model of about 0.4M parameters and a byte-level tokenizer into `folder`, in Hugging Face's format.

    The same `seed` gives the same weights, another seed other weights; the tokenizer is always the same. Its
    vocabulary is padded to the model's, so that every id the model can sample decodes. Returns the folder.
    """
    folder = Path(folder)
    tokenizer = make_tiny_tokenizer()
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        # Wider than the usual 0.02: with that, every next token would be almost equally likely.
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tiny_classifier(folder: str | Path, *, seed: int = 1) -> Path:
    """Write a sequence classifier with the labels "bad", "good" and "odd", of the same size, and the tokenizer. Returns the folder."""
    folder = Path(folder)
    labels = ("bad", "good", "odd")
    config = Qwen2Config.from_pretrained(
        make_tiny_model(folder),
        num_labels=3,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForSequenceClassification(config)
    model.save_pretrained(folder)
    return folder


def make_tiny_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer of exactly `VOCAB_SIZE` tokens, trained on arithmetic, with a chat template."""
    untrained = Qwen2Tokenizer()
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = untrained.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(_arithmetic(), trainer)
    model = json.loads(trained.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(merge) for merge in model["merges"]]
    vocab |= {f"<|unused{index}|>": len(vocab) + index for index in range(VOCAB_SIZE - len(vocab))}
    special = {"eos_token": EOS, "pad_token": PAD, "unk_token": PAD}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH, **special)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _arithmetic() -> list[str]:
    draw = random.Random(0)
    lines = []
    for _ in range(2000):
        a, b = draw.randrange(100), draw.randrange(100)
        lines.append(f"user: What is {a} + {b}?\nassistant: The answer is {a} + {b} = {a + b}.\n")
    return lines
