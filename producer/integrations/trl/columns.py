"""What a `rollout_func` gives back: lists with one entry a completion, checked, since TRL does not."""

from collections.abc import Sequence
from typing import Any

from buffer import RolloutGroup, RolloutState
from producer.errors import ProducerError


def columns(groups: Sequence[RolloutGroup], most_tokens: int) -> dict[str, list[Any]]:
    """`prompt_ids`, `completion_ids` and `logprobs` as TRL needs them, and further columns that reward functions receive.

    These are `rollout_id`, `rollout_reward`, `rollout_score` and `finish_reason`. `env_mask` is there where a response holds
    tokens that are not trained on.

    Args:
        groups: completed.
        most_tokens: of a completion.

    Raises:
        ProducerError: a rollout that is no completion.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    for rollout in rollouts:
        _check(rollout, most_tokens)
    given: dict[str, list[Any]] = {
        "prompt_ids": [_ids(rollout).tolist() for rollout in rollouts],
        "completion_ids": [rollout.response_ids.tolist() for rollout in rollouts],
        "logprobs": [rollout.logprobs.tolist() for rollout in rollouts],
        "rollout_id": [rollout.rollout_id for rollout in rollouts],
        "rollout_reward": [rollout.reward for rollout in rollouts],
        "rollout_score": [rollout.score for rollout in rollouts],
        "finish_reason": [rollout.finish_reason for rollout in rollouts],
    }
    if any((rollout.loss_mask == 0).any() for rollout in rollouts):
        given["env_mask"] = [rollout.loss_mask.tolist() for rollout in rollouts]
    return given


def _ids(rollout: RolloutState) -> Any:
    return [] if rollout.prompt_ids is None else rollout.prompt_ids


def _check(rollout: RolloutState, most_tokens: int) -> None:
    """Unequal lengths cannot come: a rollout's arrays always have one length."""
    n = int(rollout.response_ids.size)
    if rollout.left_out:
        raise ProducerError(f"rollout {rollout.rollout_id} failed ({rollout.error}); TRL needs every completion: leave min_group_size out")
    if len(_ids(rollout)) == 0:
        raise ProducerError(f"rollout {rollout.rollout_id} has no prompt_ids; the agent loop must set them")
    if n == 0 or not (rollout.loss_mask == 1).any():
        raise ProducerError(f"rollout {rollout.rollout_id} has {n} tokens and none to train on; the agent loop must sample at least one")
    if n > most_tokens:
        raise ProducerError(
            f"rollout {rollout.rollout_id} has {n} tokens, over max_completion_length={most_tokens}; lower max_tokens, or raise that"
        )
