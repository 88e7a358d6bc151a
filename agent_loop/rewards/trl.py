"""`trl_reward`: reward functions written for TRL's trainers, as rewards of a rollout or of a group; TRL itself is not needed."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agent_loop.deadline import is_async
from agent_loop.rewards.judgement import Judgement, answers_of
from agent_loop.rewards.judging import name_of
from buffer.rollout import RolloutGroup, RolloutState
from buffer.rows import drawn_messages

_OWN_COLUMNS = ("prompt", "completion", "completion_ids")
"""Columns that TRL does not hand on."""


@dataclass(frozen=True, slots=True)
class _PolicyState:
    """Stands in for `trainer_state`: what is known of the trainer here."""

    global_step: int


def trl_reward(
    function: Callable[..., Any], *, trainer_state: Any = None, log_extra: Callable[[str, list[Any]], None] | None = None
) -> Callable[[Any], Any]:
    """A reward function with TRL's signature as a reward of ours, of a rollout or, as `group_reward` or `of_group`, of a group.

    It is called as TRL's trainers do, by keyword: `prompts`, `completions` (texts, or lists of messages where the prompt is a
    chat), `completion_ids`, `trainer_state`, `log_extra`, `log_metric` and the columns of the row, each a list with one value for
    each completion. It gives a list of numbers; None is no say on that completion, which counts in a `RewardSet` only.

    TRL calls it with the completions of many prompts. Here they are those of one rollout, or of one group.

    Args:
        function: sync or async.
        trainer_state: what it is given under this name, or a function that gives it. By default it has `global_step`, the newest
            version of the weights that sampled the completions.
        log_extra: is given the columns that it logs; they are dropped by default, unless they are numbers. Those, and what it
            logs by `log_metric`, are kept in the rollout's `metrics`. It is called on the function's thread.
    """

    if not callable(function):
        raise ValueError(f"function={function!r:.80} is none; give a reward function with TRL's signature, not the name of one")
    if log_extra is not None and not callable(log_extra):
        raise ValueError(f"log_extra={log_extra!r:.80} is no function; give one of (column, values)")

    def called(subject: RolloutState | RolloutGroup) -> tuple[_Logged, Any]:
        states = _states(subject)
        logged = _Logged(len(states), log_extra)
        state = trainer_state() if inspect.isroutine(trainer_state) else trainer_state
        state = _PolicyState(max((int(one.versions.max()) for one in states if one.versions.size), default=0)) if state is None else state
        return logged, function(**_arguments(function, states), trainer_state=state, log_extra=logged.extra, log_metric=logged.metric)

    def unpacked(subject: RolloutState | RolloutGroup, logged: _Logged, given: Any) -> Any:
        answers = logged.judgements(answers_of(given, len(_states(subject)), name_of(function)))
        return answers if isinstance(subject, RolloutGroup) else answers[0]

    if is_async(function):

        async def reward_async(subject: RolloutState | RolloutGroup) -> Any:
            logged, given = called(subject)
            return unpacked(subject, logged, await given)

        return _named(reward_async, function)

    def reward(subject: RolloutState | RolloutGroup) -> Any:
        return unpacked(subject, *called(subject))

    return _named(reward, function)


def _named(reward: Callable[[Any], Any], function: Callable[..., Any]) -> Callable[[Any], Any]:
    reward.__name__, reward.__doc__ = name_of(function), function.__doc__
    return reward


def _states(subject: RolloutState | RolloutGroup) -> list[RolloutState]:
    return subject.rollouts if isinstance(subject, RolloutGroup) else [subject]


def _arguments(function: Callable[..., Any], states: Sequence[RolloutState]) -> dict[str, Any]:
    if any(state.text is None for state in states) and "completions" in inspect.signature(function).parameters:
        raise ValueError("the rollout has no text to complete the prompt with; give the agent loop a tokenizer")
    columns = [key for key in states[0].row if key not in _OWN_COLUMNS]
    return {key: [state.row.get(key) for state in states] for key in columns if isinstance(key, str)} | {
        "prompts": [_prompt(state) for state in states],
        "completions": [_completion(state) for state in states],
        "completion_ids": [state.response_ids.tolist() for state in states],
    }


def _prompt(state: RolloutState) -> Any:
    return state.prompt if state.messages is None else drawn_messages(state.row, state.messages)


def _completion(state: RolloutState) -> Any:
    """The text, or in a chat the messages that were added to the prompt's: by the loop, or the response as the assistant's."""
    if state.messages is None:
        return state.text
    added = state.messages[len(drawn_messages(state.row, state.messages) or []) :]
    return [dict(message) for message in added] or [{"role": "assistant", "content": state.text}]


@dataclass(slots=True)
class _Logged:
    """What a function logs of its completions while it runs."""

    n: int
    log_extra: Callable[[str, list[Any]], None] | None
    metrics: list[dict[str, float]] = field(init=False)

    def __post_init__(self) -> None:
        self.metrics = [{} for _ in range(self.n)]

    def extra(self, column: str, values: Sequence[Any]) -> None:
        """A value for each completion."""
        listed = list(values)
        if self.log_extra is not None:
            self.log_extra(column, listed)
        for own, value in zip(self.metrics, listed, strict=True):
            if isinstance(value, int | float) and math.isfinite(value):
                own[column] = float(value)

    def metric(self, name: str, value: float) -> None:
        """One number for all; one that is not finite tells nothing, and must not fail the rollout."""
        if math.isfinite(value):
            for own in self.metrics:
                own[name] = float(value)

    def judgements(self, answers: Sequence[Any]) -> list[Any]:
        """The answers with what was logged of them."""
        return [
            Judgement(answer, metrics=own) if own and answer is not None and not isinstance(answer, Judgement) else answer
            for answer, own in zip(answers, self.metrics, strict=True)
        ]
