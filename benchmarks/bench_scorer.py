"""What a `Scorer` costs over a bare packed forward pass of the same model: `python -m benchmarks.bench_scorer` prints a table.

    python -m benchmarks.bench_scorer [--rounds 7] [--sequences 8] [--tokens 256] [--vocabulary 16000]

Every contender reads the same sequences in the same packed rows on one thread, in random order, each round anew, and the first
round is thrown away. Ratios are of CPU time, which other programs disturb little, and are formed round by round. The bare pass makes the
logits of all tokens and takes nothing from them; the plain one then takes log-probabilities, as a trainer does. Memory is by how much
a process of its own grows at most, which has the model already; the scorer may have 32 MiB of logits at once.
"""

import argparse
import os
import random
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from producer.experience import OffPolicy
from producer.experience.off_policy import correct
from producer.experience.packing import Layout
from producer.experience.scorer import Scorer

Sequences = list[np.ndarray]
BUDGET = 2048


def model_of(vocabulary: int) -> Any:
    """A Qwen2 of some 9 million parameters with random weights, whose head is half of the work: more than in larger ones."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).eval()


def sequences_of(count: int, tokens: int, vocabulary: int) -> Sequences:
    """Of half to one and a half times that many tokens; the first quarter is the prompt."""
    draw = np.random.default_rng(0)
    return [draw.integers(0, vocabulary, size) for size in draw.integers(tokens // 2, tokens * 3 // 2, count)]


def bare(model: Any, sequences: Sequences, *, take: bool) -> None:
    """A forward pass over each row, and log-probabilities of every next token if they are to be taken."""
    layout = Layout.packed([one.size for one in sequences], BUDGET)
    ids, positions = (torch.as_tensor(one) for one in (layout.place(sequences, fill=0, dtype=np.int64), layout.position_ids))
    for row, numbers in enumerate(layout.rows):
        size = sum(layout.lengths[number] for number in numbers)
        given, at = ids[row : row + 1, :size], positions[row : row + 1, :size]
        with torch.no_grad():
            logits = model(input_ids=given, position_ids=at, use_cache=False).logits
            if take:
                torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, given[:, 1:, None])


def contenders(model: Any, sequences: Sequences) -> dict[str, Callable[[], Any]]:
    """Each reads all sequences once; the first is the baseline."""
    scorer = Scorer(model, token_budget=BUDGET, logit_bytes=32 << 20)
    prompts = [one.size // 4 for one in sequences]
    return {
        "bare forward pass": lambda: bare(model, sequences, take=False),
        "bare forward pass, again": lambda: bare(model, sequences, take=False),
        "forward pass and plain log-probabilities": lambda: bare(model, sequences, take=True),
        "Scorer, every token": lambda: scorer.score(sequences, 1),
        "Scorer, every token, with entropies": lambda: scorer.score(sequences, 1, entropy=True),
        "Scorer, responses": lambda: scorer.score(sequences, prompts),
    }


def seconds(run: Callable[[], Any]) -> float:
    """CPU time of all threads."""
    began = time.process_time()
    run()
    return time.process_time() - began


def peak_of(run: Callable[[], Any]) -> float:
    """MiB by which a process of its own grows at most; it is forked before anything else has run on this one's heap."""
    reads, writes = os.pipe()
    if os.fork() == 0:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = high_water()
        run()
        os.write(writes, str(high_water() - before).encode())
        os._exit(0)
    os.wait()
    return float(os.read(reads, 64))


def high_water() -> float:
    """The peak of this process's resident memory so far, in MiB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


def spread(values: list[float]) -> str:
    """Median (least to most)."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def correction() -> str:
    """What the weights of a large batch cost."""
    draw = np.random.default_rng(0)
    lengths = np.full(1024, 4096)
    sampler = -draw.exponential(1.0, int(lengths.sum()))
    trainer = sampler + draw.normal(0, 0.1, sampler.size)
    cases = {
        "tis": OffPolicy("token", truncate=(0, 2)),
        "mis": OffPolicy("sequence", mask="sequence", keep=(0, 3)),
        "tis and a geometric mask": OffPolicy("token", truncate=(0, 2), mask="geometric", keep=(0.999, 1.001)),
    }
    rows = []
    for name, config in cases.items():
        times = [seconds(lambda config=config: correct(config, lengths, trainer=trainer, sampler=sampler)) for _ in range(5)]  # type: ignore[misc]
        rows.append(f"| {name} | {spread(times)} |")
    return "| correction of 1 024 x 4 096 tokens | s of CPU |\n| --- | --- |\n" + "\n".join(rows)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=16_000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, sequences = model_of(given.vocabulary), sequences_of(given.sequences, given.tokens, given.vocabulary)
    runs = contenders(model, sequences)
    peaks = {name: peak_of(run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(given.rounds + 1):
        for name in random.sample(list(runs), len(runs)):
            times[name].append(seconds(runs[name]))
    total = sum(one.size for one in sequences)
    print(f"{len(sequences)} sequences, {total} tokens, rows of {BUDGET}, a vocabulary of {given.vocabulary}, {given.rounds} rounds.\n")
    print("| | tokens a second of CPU | of the bare pass | grows by, MiB |\n| --- | --- | --- | ---: |")
    first = next(iter(runs))
    for name, own in times.items():
        ratios = [time / base for time, base in zip(own[1:], times[first][1:], strict=True)]
        print(f"| {name} | {total / statistics.median(own[1:]):,.0f} | {spread(ratios)} | {peaks[name]:.0f} |")
    print(f"\n{correction()}")


if __name__ == "__main__":
    main()
