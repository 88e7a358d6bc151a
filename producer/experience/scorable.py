"""Which rollouts of a batch are worth scoring, and the tokens that a model is to read of each."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from buffer.rollout import RolloutGroup
from producer.experience.attached import prompt_of, why_left_out


@dataclass(frozen=True)
class Scorable:
    """A rollout as a model reads it: prompt and response, of which tokens from `start` on are the response's."""

    rollout_id: str
    token_ids: NDArray[np.int32]
    start: int


def scorable(groups: Iterable[RolloutGroup]) -> Iterator[Scorable]:
    """Those that can be trained on; `make_experience` leaves the others out, so that nothing is computed for them.

    Raises:
        ValueError: a rollout has media, which are not in its tokens.
    """
    for rollout in (one for group in groups for one in group.rollouts):
        if why_left_out(rollout) is not None:
            continue
        if rollout.media:
            raise ValueError(
                f"rollout {rollout.rollout_id} has media, and a scorer shows a model tokens only; attach log-probabilities that "
                "you computed with its media"
            )
        prompt = prompt_of(rollout)
        yield Scorable(rollout.rollout_id, np.concatenate([prompt, rollout.response_ids]), prompt.size)
