"""`make_experience`: from finished groups to arrays that a training step takes as they are."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent_loop.arguments import at_least, instance
from buffer.rollout import RolloutGroup, RolloutState
from producer.experience.advantages import AdvantageFn, zero_variance
from producer.experience.arrays import NO_VERSION, Experience
from producer.experience.attached import Attached, prompt_of, reward_of, reward_parts, trained, what_it_lacks, why_left_out
from producer.experience.behaviour import corrected
from producer.experience.config import AdvantageConfig
from producer.experience.estimate import Estimate, Scored, estimate
from producer.experience.off_policy import Correction, OffPolicy, off_policy_named
from producer.experience.packing import Layout
from producer.experience.running import RunningMoments
from producer.experience.shaping import shape_rewards
from producer.experience.statistics import advantage_statistics, entropy_statistics
from producer.experience.whitening import clip

Array = NDArray[np.float64]
_FLOAT32 = float(np.finfo(np.float32).max)


def make_experience(
    groups: Sequence[RolloutGroup],
    *,
    advantage: str | AdvantageFn | AdvantageConfig = "grpo",
    attached: Attached | None = None,
    off_policy: str | OffPolicy | None = None,
    running: RunningMoments | None = None,
    token_budget: int | None = None,
    pad_id: int = 0,
) -> Experience:
    """Arrays to train on from finished groups: a whole batch at once, since baselines, whitening and moments are of the batch.

    Args:
        groups: as `ReplayBuffer.take` and `produce_batch` give them; of any sizes.
        advantage: the name of an estimator such as "grpo", "drgrpo", "rloo"; a function of (rewards with NaN where there is none,
            group numbers) giving one finite number a rollout; or an `AdvantageConfig`, which shapes, normalises, whitens and clips too.
        attached: log-probabilities of a reference and of the policy that is trained, values of a critic, greedy rewards: where the
            configuration or the correction needs them.
        off_policy: the name of a correction such as "tis", "icepop", "mis", or an `OffPolicy`: makes `Experience.importance` of what
            the stored log-probabilities and versions say. None: tokens are trained on as if the trainer had sampled them.
        running: `Experience.running` of the batch before, for a configuration that normalises; None at the start of a run.
        token_budget: the most tokens of a row, prompts included: sequences are packed. None: one sequence a row, padded on the right.
        pad_id: fills `input_ids` where there is no token.

    A rollout that cannot be trained on is left out, and counted in `metrics` as "left_out/<reason>"; docs/reference/metrics.md
    lists the reasons. Its reward, if it has one, still counts in its group's baseline: it was sampled all the same.

    Raises:
        ValueError: nothing is left to train on, a sequence is longer than the budget, an advantage has no room in float32, or what the
            configuration or the correction needs is not attached.
    """
    config = advantage if isinstance(advantage, AdvantageConfig) else AdvantageConfig(advantage)
    groups = _listed(groups)
    check_rows(token_budget, pad_id)
    instance("running", running, RunningMoments | None, "the RunningMoments of the batch before, or None")
    instance("attached", attached, Attached | None, "an Attached, or None")
    beside, correction = attached or Attached(), None if off_policy is None else off_policy_named(off_policy)
    beside.check(config, correction)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards, metrics = _shaped(rollouts, config)
    reasons = [_why_left_out(rollout, reward, beside, config, correction) for rollout, reward in zip(rollouts, rewards, strict=True)]
    kept = [at for at, reason in enumerate(reasons) if reason is None]
    left_out = Counter(reason for reason in reasons if reason is not None)
    if not kept:
        raise ValueError(f"none of {len(rollouts)} rollouts in {len(groups)} groups can be trained on: {dict(left_out)}")
    chosen = [rollouts[at] for at in kept]
    layout = _layout(chosen, token_budget)
    numbers = np.repeat(np.arange(len(groups)), [len(group.rollouts) for group in groups])
    made = estimate(config, _scored(rollouts, rewards, numbers, kept, beside, config), running)
    _check_finite(made, chosen)
    metrics |= _metrics(rollouts, rewards, numbers, left_out) | _size_metrics(chosen, layout) | made.metrics
    metrics |= advantage_statistics(made.advantages) | entropy_statistics(
        np.concatenate([one.logprobs[one.loss_mask == 1] for one in chosen])
    )
    weighed = None if correction is None else corrected(correction, chosen, beside, made.advantages)
    if weighed is not None and correction is not None:
        metrics |= weighed.metrics | ({"tokens/trained": float(weighed.kept.sum())} if correction.drop else {})
    dropping = correction is not None and correction.drop
    packed = token_budget is not None
    return _assemble(chosen, rewards[kept], made, beside, layout, metrics, weighed, pad_id=pad_id, packed=packed, dropping=dropping)


def check_rows(token_budget: int | None, pad_id: int) -> None:
    """Raises ValueError for a budget that holds no token, and for an id that no token has."""
    if token_budget is not None:
        at_least("token_budget", token_budget, 1)
    at_least("pad_id", pad_id, 0)


def _listed(groups: Sequence[RolloutGroup]) -> Sequence[RolloutGroup]:
    if isinstance(groups, RolloutGroup | str) or not isinstance(groups, Iterable):
        raise ValueError(
            f"groups={groups!r:.80} must be a list of RolloutGroups: [group] where it is one, batch.groups where it is a batch"
        )
    listed = list(groups)
    for at, group in enumerate(listed):
        instance(f"groups[{at}]", group, RolloutGroup, "a RolloutGroup, as take and produce_batch give them")
    return listed


def _shaped(rollouts: Sequence[RolloutState], config: AdvantageConfig) -> tuple[Array, dict[str, float]]:
    """Rewards after shaping and clipping, NaN where there is none; and what fraction was clipped."""
    rewards = np.array([reward_of(rollout) for rollout in rollouts], np.float64)
    if config.shape:
        sizes = [rollout.response_ids.size for rollout in rollouts]
        rewards = shape_rewards(rewards, sizes, [rollout.finish_reason == "length" for rollout in rollouts], config.shape)
    if config.reward_clip is None:
        return rewards, {}
    clipped, fraction = clip(rewards, config.reward_clip)
    return clipped, {"reward/clipped": fraction}


def _why_left_out(
    rollout: RolloutState, reward: float, attached: Attached, config: AdvantageConfig, off_policy: OffPolicy | None
) -> str | None:
    if (reason := why_left_out(rollout)) is not None:
        return reason
    return "shaped_not_finite" if np.isnan(reward) else what_it_lacks(rollout, attached, config, off_policy)


def _scored(
    rollouts: Sequence[RolloutState],
    rewards: Array,
    numbers: NDArray[np.intp],
    kept: Sequence[int],
    attached: Attached,
    config: AdvantageConfig,
) -> Scored:
    lengths = np.zeros(len(rollouts), np.int64)
    lengths[kept] = [int((rollouts[at].loss_mask == 1).sum()) for at in kept]
    chosen, needs = [rollouts[at] for at in kept], config.spec.needs
    known = rewards.copy()
    if config.kl_in_reward:
        # Without its tokens' divergence a reward is not that of the others, and has no part in their baseline.
        known[lengths == 0] = np.nan
    parts, weights = reward_parts(rollouts, config.part_weights) if needs == "parts" else (None, None)
    baselines = [attached.baselines.get(rollout.group_id, np.nan) for rollout in rollouts] if needs == "baselines" else None
    return Scored(
        known,
        numbers,
        lengths,
        logprobs=np.concatenate([one.logprobs[one.loss_mask == 1] for one in chosen]).astype(np.float64) if config.kl else None,
        reference=np.concatenate([trained(attached.reference, one, "reference") for one in chosen]) if config.kl else None,
        values=np.concatenate([trained(attached.values, one, "values") for one in chosen]) if needs == "values" else None,
        baselines=None if baselines is None else np.array(baselines, np.float64),
        parts=parts,
        part_weights=weights,
    )


def _check_finite(made: Estimate, chosen: Sequence[RolloutState]) -> None:
    """Raises ValueError for an advantage or a return that float32 has no room for: a loss of it would be NaN."""
    for name, values in (("advantage", made.advantages), ("return", made.returns)):
        if values is None or not values.size or max(-values.min(), values.max()) <= _FLOAT32:  # NaN is not
            continue
        at = int(np.argmin(np.abs(values) <= _FLOAT32))
        owner = np.repeat(np.arange(len(chosen)), [int((one.loss_mask == 1).sum()) for one in chosen])[at]
        raise ValueError(
            f"the {name} of rollout {chosen[owner].rollout_id} is {values[at]}, which float32 cannot hold; look at its reward "
            f"{chosen[owner].reward} and at what is attached, and give the estimator an eps above 0"
        )


def _layout(chosen: Sequence[RolloutState], token_budget: int | None) -> Layout:
    lengths = [prompt_of(rollout).size + rollout.response_ids.size for rollout in chosen]
    if token_budget is None:
        return Layout.padded(lengths)
    if max(lengths) > token_budget:
        longest = int(np.argmax(lengths))
        raise ValueError(
            f"rollout {chosen[longest].rollout_id} has {lengths[longest]} tokens, over token_budget={token_budget}; "
            "raise the budget or allow shorter responses"
        )
    return Layout.packed(lengths, token_budget)


class _Places:
    """Where values of trained tokens go: each rollout's at its own, none at those that a correction dropped."""

    def __init__(self, rollouts: Sequence[RolloutState], layout: Layout, dropped: Correction | None) -> None:
        self._rollouts, self._layout = rollouts, layout
        self._masks = [np.concatenate([np.zeros(prompt_of(one).size, np.bool_), one.loss_mask == 1]) for one in rollouts]
        self.bounds = np.cumsum([mask.sum() for mask in self._masks])[:-1]
        self._kept = None if dropped is None else np.split(dropped.kept, self.bounds)

    def flat(self, values: NDArray[Any] | None, outside: float = 0.0, dtype: type[np.generic] = np.float32) -> NDArray[Any] | None:
        """(N, T) of values flat over the trained tokens of all, `outside` everywhere else."""
        return None if values is None else self.each(np.split(values, self.bounds), outside, dtype)

    def each(self, values: Sequence[Any], outside: float = 0.0, dtype: type[np.generic] = np.float32) -> NDArray[Any]:
        """(N, T) of values by rollout, of its trained tokens, or one for all of them."""
        every = []
        for number, (value, mask) in enumerate(zip(values, self._masks, strict=True)):
            every.append(np.full(mask.size, outside, dtype))
            every[-1][mask] = value if self._kept is None else np.where(self._kept[number], value, outside)
        return self._layout.place(every, fill=outside, dtype=dtype)

    def attached(self, beside: Attached, name: str) -> NDArray[np.float32] | None:
        """(N, T) of what is attached by that name; None where a rollout lacks it."""
        by_id = getattr(beside, name)
        if any(one.rollout_id not in by_id for one in self._rollouts):
            return None
        return self.each([trained(by_id, one, name) for one in self._rollouts])


def _assemble(
    rollouts: Sequence[RolloutState],
    rewards: Array,
    made: Estimate,
    attached: Attached,
    layout: Layout,
    metrics: dict[str, float],
    weighed: Correction | None,
    *,
    pad_id: int,
    packed: bool,
    dropping: bool,
) -> Experience:
    places = _Places(rollouts, layout, weighed if dropping else None)
    return Experience(
        input_ids=layout.place([np.concatenate([prompt_of(one), one.response_ids]) for one in rollouts], fill=pad_id, dtype=np.int64),
        attention_mask=None if packed else (layout.seq_idx >= 0).astype(np.int64),
        position_ids=layout.position_ids,
        loss_mask=places.each([True] * len(rollouts), False, np.bool_),
        logprobs=places.each([one.logprobs[one.loss_mask == 1] for one in rollouts]),
        advantages=places.each(np.split(made.advantages, places.bounds)),
        versions=places.each([one.versions[one.loss_mask == 1] for one in rollouts], NO_VERSION, np.int32),
        reference_logprobs=places.attached(attached, "reference"),
        values=places.attached(attached, "values"),
        returns=places.flat(made.returns),
        trainer_logprobs=places.attached(attached, "trainer"),
        importance=places.flat(None if weighed is None else weighed.weights),
        rewards=rewards,
        group_ids=np.array([rollout.group_id for rollout in rollouts], np.int64),
        rollout_ids=tuple(rollout.rollout_id for rollout in rollouts),
        metrics=metrics,
        layout=layout,
        running=made.running,
        media=tuple(tuple(one.media or ()) for one in rollouts),
        pad_id=pad_id,
    )


def _metrics(rollouts: Sequence[RolloutState], rewards: Array, numbers: NDArray[np.intp], left_out: Counter[str]) -> dict[str, float]:
    known = rewards[~np.isnan(rewards)]
    scores = [rollout.score for rollout in rollouts if rollout.score is not None and np.isfinite(rollout.score)]
    metrics = {"reward/mean": float(known.mean()), "reward/std": float(known.std())}
    if scores:
        metrics["score/mean"] = float(np.mean(scores))
    metrics["groups/zero_variance"] = zero_variance(rewards, numbers)
    metrics["left_out/total"] = float(left_out.total())
    return metrics | {f"left_out/{reason}": float(count) for reason, count in sorted(left_out.items())}


def _size_metrics(chosen: Sequence[RolloutState], layout: Layout) -> dict[str, float]:
    """Of the rollouts that are trained on; response lengths count tokens of the environment too."""
    return {
        "rollouts": float(len(chosen)),
        "length/mean": float(np.mean([rollout.response_ids.size for rollout in chosen])),
        "length/max": float(max(rollout.response_ids.size for rollout in chosen)),
        "tokens/trained": float(sum(int((rollout.loss_mask == 1).sum()) for rollout in chosen)),
        "tokens/fill": sum(layout.lengths) / (len(layout.rows) * layout.width),
    }
