"""From stored groups to the arrays of a training step: 1 024 rollouts of 4 096 tokens; and estimators beside torch's vectorised forms.

    python -m benchmarks.bench_experience [--rollouts 1024] [--tokens 4096] [--repeats 5]

The first table is CPU time of the one thread, and the most memory that was taken meanwhile (numpy tells tracemalloc of its arrays, in runs
of their own) in bytes of the arrays that come out. The second compares estimators alone with the same formulas in torch on one thread,
written as TRL's and verl's trainers have them: rewards reshaped by group, and loops over positions that take all sequences at once.
Sides take turns.
"""

import argparse
import dataclasses
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.workload import print_table
from buffer import RolloutGroup, RolloutState, Status
from producer.experience import AdvantageConfig, Attached, Experience, make_experience
from producer.experience.advantages import grpo, rloo
from producer.experience.balancing import Cost, balance
from producer.experience.returns import discounted_returns, gae, token_rewards
from producer.experience.whitening import whiten

GROUP = 8
PROMPT = 512


def batch(rollouts: int, tokens: int) -> list[RolloutGroup]:
    """Groups as the buffer hands them out; one response in two has tokens of an environment in its middle."""
    rng = np.random.default_rng(0)
    prompt, response = min(PROMPT, tokens // 2), tokens - min(PROMPT, tokens // 2)
    mask = np.ones(response, np.uint8)
    mask[response // 3 : response // 2] = 0

    def member(group: int, index: int) -> RolloutState:
        return RolloutState(
            group,
            index,
            status=Status.COMPLETED,
            prompt_ids=np.arange(1, prompt + 1),
            response_ids=rng.integers(0, 150_000, response),
            logprobs=-rng.random(response, np.float32),
            loss_mask=mask if index % 2 else np.ones_like(mask),
            versions=np.zeros(response, np.int32),
            finish_reason="stop",
            score=float(index % 3),
            reward=float(index % 3),
        )

    return [RolloutGroup(group, [member(group, index) for index in range(GROUP)]) for group in range(1, rollouts // GROUP + 1)]


def bytes_of(made: Experience) -> int:
    """Of all arrays."""
    values = (getattr(made, field.name) for field in dataclasses.fields(made))
    return sum(value.nbytes for value in values if isinstance(value, np.ndarray))


def seconds(work: Callable[[], Any]) -> float:
    """CPU time of this thread."""
    began = time.thread_time()
    work()
    return time.thread_time() - began


def most_memory(work: Callable[[], Experience]) -> float:
    """The most that was taken over what was there before, in bytes of what came out."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    made = work()
    most = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return most / bytes_of(made)


def stage(groups: Sequence[RolloutGroup], tokens: int, repeats: int) -> list[list[str]]:
    """Rows of the first table."""
    members = [one for group in groups for one in group.rollouts]
    values = Attached(values={one.rollout_id: np.zeros(one.response_ids.size, np.float32) for one in members})
    kinds: dict[str, Callable[[], Experience]] = {
        "GRPO, packed": lambda: make_experience(groups, token_budget=4 * tokens),
        "GRPO, padded": lambda: make_experience(groups),
        "REINFORCE++, packed": lambda: make_experience(groups, advantage="reinforce++", token_budget=4 * tokens),
        "GAE, packed": lambda: make_experience(groups, advantage="gae", attached=values, token_budget=4 * tokens),
        "RLOO with normalised rewards, packed": lambda: make_experience(
            groups, advantage=AdvantageConfig("rloo", normalise=True), token_budget=4 * tokens
        ),
    }
    taken = {name: [seconds(kind) for _ in range(repeats)] for name, kind in kinds.items()}
    memory = {name: most_memory(kind) for name, kind in kinds.items()}
    made = kinds["GRPO, packed"]()
    taken["and split over 8 ranks"] = [seconds(lambda: made.split(8, token_budget=4 * tokens)) for _ in range(repeats)]
    lengths = np.random.default_rng(0).integers(64, tokens, len(members)).tolist()
    plan = [seconds(lambda: balance(lengths, 8, token_budget=4 * tokens, cost=Cost.transformer(4096))) for _ in range(repeats)]
    taken["its plan alone, for lengths of every kind"] = plan
    return [[name, spread(times, 1000), f"{memory[name]:.2f}" if name in memory else ""] for name, times in taken.items()]


def spread(values: Sequence[float], factor: float) -> str:
    """Median, least and most."""
    return f"{statistics.median(values) * factor:.3g} ({min(values) * factor:.3g} to {max(values) * factor:.3g})"


# -- the same formulas in torch


def torch_grpo(rewards: torch.Tensor) -> torch.Tensor:
    """TRL 1.16's: rewards may be NaN, groups are of one size and in order."""
    grouped = rewards.view(-1, GROUP)
    mean = torch.nanmean(grouped, dim=1).repeat_interleave(GROUP, dim=0)
    count = (~torch.isnan(grouped)).sum(dim=1)
    variance = torch.nanmean((grouped - torch.nanmean(grouped, dim=1, keepdim=True)) ** 2, dim=1) * count / (count - 1)
    return torch.nan_to_num((rewards - mean) / (torch.sqrt(variance).repeat_interleave(GROUP, dim=0) + 1e-4), nan=0.0)


def torch_rloo(rewards: torch.Tensor) -> torch.Tensor:
    """TRL 1.16's."""
    grouped = rewards.view(-1, GROUP)
    counts = (~torch.isnan(grouped)).sum(dim=1, keepdim=True)
    baselines = (torch.nansum(grouped, dim=1, keepdim=True) - grouped) / (counts - 1)
    return torch.nan_to_num(rewards - baselines.view(-1), nan=0.0)


def verl_rloo(rewards: torch.Tensor, ids: np.ndarray) -> torch.Tensor:
    """verl's vectorised one: groups of any sizes, in any order, but no reward may be missing."""
    index = torch.from_numpy(np.unique(ids, return_inverse=True)[1])
    counts = torch.bincount(index)[index].to(rewards.dtype)
    return ((counts * rewards - torch.bincount(index, weights=rewards)[index]) / (counts - 1).clamp_min(1)) * (counts > 1)


def torch_whiten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    total = mask.sum()
    mean = (values * mask).sum() / total
    variance = ((values - mean).square() * mask).sum() / total * total / (total - 1)
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def torch_gae(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float = 1.0, lam: float = 0.95) -> torch.Tensor:
    following, last, found = torch.zeros(len(rewards)), torch.zeros(len(rewards)), []
    for step in reversed(range(rewards.shape[-1])):
        delta = rewards[:, step] + gamma * following - values[:, step]
        advantage = delta + gamma * lam * last
        following = values[:, step] * mask[:, step] + (1 - mask[:, step]) * following
        last = advantage * mask[:, step] + (1 - mask[:, step]) * last
        found.append(last)
    return torch_whiten(torch.stack(found[::-1], dim=1), mask)


def torch_reinforce(rewards: torch.Tensor, mask: torch.Tensor, gamma: float = 0.99) -> torch.Tensor:
    running, returns = torch.zeros(len(rewards)), torch.zeros_like(rewards)
    for step in reversed(range(rewards.shape[-1])):
        running = rewards[:, step] + gamma * running
        returns[:, step] = running
        running = running * mask[:, step]
    return torch_whiten(returns, mask)


def estimators(rollouts: int, tokens: int, repeats: int) -> list[list[str]]:
    """Rows of the second table: ours, torch's, their ratio."""
    rng = np.random.default_rng(0)
    rewards, ids = rng.integers(0, 3, rollouts).astype(np.float64), np.repeat(np.arange(rollouts // GROUP), GROUP)
    lengths = rng.integers(tokens // 2, tokens + 1, rollouts)
    flat = rng.normal(size=int(lengths.sum()))
    scored, trained = token_rewards(rewards, lengths), np.ones(flat.size, np.bool_)
    mask = torch.arange(tokens) < torch.from_numpy(lengths)[:, None]
    placed, values = torch.zeros(rollouts, tokens), torch.zeros(rollouts, tokens)
    placed[mask], values[mask] = torch.from_numpy(scored).float(), torch.from_numpy(flat).float()
    short, weights = torch.from_numpy(rewards).float(), mask.float()
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "GRPO, TRL's form": (lambda: grpo(rewards, ids), lambda: torch_grpo(short)),
        "RLOO, TRL's form": (lambda: rloo(rewards, ids), lambda: torch_rloo(short)),
        "RLOO, verl's form": (lambda: rloo(rewards, ids), lambda: verl_rloo(short, ids)),
        "whitening": (lambda: whiten(flat, trained), lambda: torch_whiten(values, weights)),
        "discounted returns, whitened (REINFORCE++)": (
            lambda: whiten(discounted_returns(scored, lengths, 0.99), trained),
            lambda: torch_reinforce(placed, weights),
        ),
        "GAE, whitened": (lambda: whiten(gae(scored, flat, lengths)[0], trained), lambda: torch_gae(placed, values, weights)),
    }
    rows = []
    for name, (ours, theirs) in pairs.items():
        times = [(seconds(ours), seconds(theirs)) for _ in range(repeats * (20 if name.endswith("form") else 1))]
        own, other = zip(*times, strict=True)
        rows.append([name, spread(own, 1000), spread(other, 1000), f"{statistics.median(own) / statistics.median(other):.2f}"])
    return rows


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{options.rollouts} rollouts of {options.tokens} tokens.\n")
    groups = batch(options.rollouts, options.tokens)
    print_table(["", "ms of CPU, median (least to most)", "memory, of the batch"], stage(groups, options.tokens, options.repeats))
    print()
    print_table(["", "ours, ms", "torch, ms", "ours of torch's"], estimators(options.rollouts, options.tokens, options.repeats))


if __name__ == "__main__":
    main()
