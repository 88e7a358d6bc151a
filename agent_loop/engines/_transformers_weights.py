"""New weights for a loaded model: everything is checked before anything is copied."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from agent_loop.engines.base import WeightSource
from agent_loop.engines.checkpoint import read_checkpoint
from agent_loop.errors import WeightUpdateError

Copies = list[tuple[torch.Tensor, torch.Tensor]]
"""Pairs (tensor of the model, its new value)."""


def plan_copies(model: Any, source: WeightSource) -> Copies:
    """What to copy where; nothing is touched yet.

    Raises:
        ValueError: a folder that holds no whole checkpoint.
        WeightUpdateError: names that the model lacks or that are missing, other shapes, tied tensors that differ.
    """
    given, targets = _tensors(source), model.state_dict(keep_vars=True)
    _refuse("names that the model does not have", sorted(set(given) - set(targets)))
    covered = {id(targets[name]) for name in given}
    # Tied weights are one tensor under several names: any of the names will do.
    _refuse("no tensor for", sorted(name for name, target in targets.items() if id(target) not in covered))
    shapes = {name: (tuple(new.shape), tuple(targets[name].shape)) for name, new in given.items()}
    _refuse("other shapes than the model:", [f"{name} {new}, not {old}" for name, (new, old) in shapes.items() if new != old])
    _refuse("no values (tensors on the meta device) for", [name for name, new in given.items() if new.is_meta])
    copies: dict[int, tuple[str, torch.Tensor, torch.Tensor]] = {}
    for name, new in given.items():
        first, _, value = copies.setdefault(id(targets[name]), (name, targets[name], new))
        if value is not new and not torch.equal(value, new):
            raise WeightUpdateError(f"{first} and {name} are tied in the model but differ in the weights; tie them before the update")
    return [(target, new) for _, target, new in copies.values()]


def copy_all(copies: Copies) -> None:
    """Put the values in place, cast to the model's dtype; whoever shares the model sees them too."""
    with torch.no_grad():
        for target, new in copies:
            target.copy_(new)
    if copies and copies[0][0].is_cuda:
        torch.cuda.synchronize(copies[0][0].device)


def _tensors(source: WeightSource) -> dict[str, torch.Tensor]:
    if isinstance(source, str | Path):
        return _read(source)
    pairs = dict(source)
    kinds = {name: type(new).__name__ for name, new in pairs.items() if not isinstance(new, torch.Tensor)}
    _refuse("values that are no tensors:", [f"{name} ({kind})" for name, kind in kinds.items()])
    # A sharded tensor (FSDP, tensor parallel) says its whole shape but copies only into its like.
    return {name: new.full_tensor() if hasattr(new, "full_tensor") else new.detach() for name, new in pairs.items()}


def _read(folder: str | Path) -> dict[str, torch.Tensor]:
    checkpoint = read_checkpoint(folder)
    tensors: dict[str, torch.Tensor] = {}
    for file, _, _ in checkpoint.stamps:
        with safe_open(checkpoint.folder / file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
    return tensors


def _refuse(what: str, found: Sequence[str]) -> None:
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise WeightUpdateError(f"the weights have {what} {', '.join(found[:3])}{more}; give all tensors of the model's own state_dict()")
