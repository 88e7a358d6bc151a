"""Parts of an experience: some of its sequences as an experience of their own, and all of them over ranks and micro-batches."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from producer.experience.balancing import Cost, balance
from producer.experience.packing import Layout

if TYPE_CHECKING:
    from producer.experience.arrays import Experience


def part(experience: "Experience", numbers: Sequence[int]) -> "Experience":
    """The sequences of these numbers, in this order: in one row where the experience is packed, else one a row.

    It knows the totals of the whole, so that losses of parts, weighed by `shift_weights`, add up to the loss of the batch. Of no numbers
    it is a filler: a token that is not trained on, with which a rank takes part in a step and changes no gradient.
    """
    chosen = list(numbers)
    if unknown := [number for number in chosen if not 0 <= number < len(experience.rollout_ids)]:
        raise ValueError(f"there is no sequence {unknown[0]} in an experience of {len(experience.rollout_ids)}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"numbers={chosen!r:.100} name a sequence twice; each is trained on once")
    lengths = [experience.layout.lengths[number] for number in chosen] or [1]
    packed = experience.attention_mask is None
    layout = Layout.packed(lengths, sum(lengths)) if packed else Layout.padded(lengths)
    own: dict[str, Any] = {"rollout_ids": tuple(experience.rollout_ids[number] for number in chosen)}
    own["media"] = tuple(experience.media[number] for number in chosen) if experience.media else ()
    own |= {name: getattr(experience, name)[chosen] for name in ("rewards", "group_ids")}
    own |= _tokens(experience, chosen, layout)
    return replace(experience, **own, layout=layout, whole=experience.whole or experience.totals)


def _tokens(experience: "Experience", chosen: Sequence[int], layout: Layout) -> dict[str, Any]:
    """Every array that has a value a token, of these sequences at their new places."""
    fills = {"input_ids": experience.pad_id, "versions": -1}
    placed: dict[str, Any] = {}
    for name in (field.name for field in fields(experience)):
        array = getattr(experience, name)
        if isinstance(array, np.ndarray) and array.shape == experience.input_ids.shape:
            taken = [array[row, start:end] for row, start, end in (experience.layout.spans[number] for number in chosen)]
            fill = fills.get(name, 0)
            placed[name] = layout.place(taken or [np.full(1, fill, array.dtype)], fill=fill, dtype=array.dtype.type)
    if not chosen:  # a model must be able to take it
        placed["input_ids"] = experience.input_ids[:1, :1].copy()
        placed |= {} if experience.attention_mask is None else {"attention_mask": np.ones((1, 1), np.int64)}
    return placed


def split(
    experience: "Experience", ranks: int, token_budget: int | None, micro_batches: int | None, cost: Cost
) -> "list[list[Experience]]":
    """Every sequence in one place; see `Experience.split`."""
    padded = experience.attention_mask is not None
    lengths = experience.layout.lengths
    plan = balance(lengths, ranks, token_budget=token_budget, micro_batches=micro_batches, cost=cost, padded=padded)
    whole = replace(experience, whole=experience.whole or experience.totals)  # counted once
    return [[part(whole, numbers) for numbers in of_rank] for of_rank in plan]
