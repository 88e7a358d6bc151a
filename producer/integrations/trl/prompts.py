"""The prompts of one call of a `rollout_func`: which are one group, and which dataset row each stands for."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from buffer.rows import prompt_fields


def grouped(prompts: Sequence[Any], size: int) -> list[Any]:
    """One prompt a group: TRL gives each `size` times in a row.

    Raises:
        ValueError: the prompts are not whole groups.
    """
    if not prompts or len(prompts) % size:
        raise ValueError(
            f"{len(prompts)} prompts are no whole groups of {size}; this process must be given every completion of a prompt: "
            "make per_device_train_batch_size * steps_per_generation a multiple of num_generations"
        )
    groups = [prompts[at : at + size] for at in range(0, len(prompts), size)]
    for at, group in enumerate(groups):
        if any(other != group[0] for other in group):
            raise ValueError(
                f"prompts {at * size} to {(at + 1) * size - 1} differ, and should be one prompt {size} times; was the sampler replaced?"
            )
    return [group[0] for group in groups]


def prompt_key(prompt: Any) -> str:
    """What two prompts have in common that are the same."""
    try:
        return json.dumps(prompt, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the prompt {prompt!r:.100} is not JSON ({error}), and cannot be stored; leave images and the like out"
        ) from error


class Rows:
    """Dataset rows by prompt: TRL hands a `rollout_func` prompts only, and rewards may need the other columns.

    Args:
        dataset: rows with a column `prompt`; None: a row holds its prompt and nothing else.

    Raises:
        ValueError: two rows have one prompt and differ otherwise: which is meant could not be told.
    """

    def __init__(self, dataset: Iterable[Mapping[str, Any]] | None) -> None:
        self._known = dataset is not None
        self._rows: dict[str, dict[str, Any]] = {}
        for row in () if dataset is None else dataset:
            if "prompt" not in row:
                raise ValueError(f"a row has no column prompt, only {sorted(map(str, row))}; TRL's datasets have one")
            key = prompt_key(row["prompt"])
            if self._rows.setdefault(key, dict(row)) != dict(row):
                raise ValueError(f"two rows have the prompt {row['prompt']!r:.100} and differ in other columns; keep one of them")

    def of(self, prompt: Any) -> dict[str, Any]:
        """The row of a prompt.

        Raises:
            ValueError: there is none, or it has no prompt that an agent loop could run.
        """
        key = prompt_key(prompt)
        if self._known and key not in self._rows:
            raise ValueError(f"no row of rows= has the prompt {prompt!r:.100}; give the dataset that the trainer has")
        row = self._rows.get(key, {"prompt": prompt})
        prompt_fields(row)
        return row
