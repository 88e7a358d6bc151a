"""`AgentLoop`: from a prompt to a finished, judged rollout; users implement `generate`, the rest is here."""

import asyncio
import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from agent_loop.calling_off import CalledOffError, CallOffs
from agent_loop.decoding import Decoding, Watcher, standing
from agent_loop.engines.base import Completion, Engine, FinishReason
from agent_loop.errors import EngineClosedError, EngineDeadError, RequestRefusedError, RewardError, first_error
from agent_loop.outcomes import fail_unjudged, interrupt, leave_out_failed, record_failure, waits_for_judgement, without_left_out
from agent_loop.rewards import REWARD_THREADS, GroupReward, Reward, RewardSet, by_kind, judge, judge_group
from agent_loop.sampling import SamplingParams, number, whole
from buffer.rollout import RolloutGroup, RolloutState
from buffer.status import Status

_BACK_OFF = 0.1
"""Seconds before the second attempt; doubled for each further one."""

_LONGEST_BACK_OFF = 30.0
"""Seconds to which it is doubled at most."""

_REQUEST_NUMBERS = itertools.count()

_FINISH_REASONS = get_args(FinishReason)


class AgentLoop(ABC):
    """Runs rollouts against an engine and judges them.

    Subclasses implement `generate(state)`, which extends the response (usually with `extend`) and sets
    `finish_reason`. Everything around it is the same for all: the members of a group run at once, one that raises
    is tried again and then failed with its reason, one that was interrupted keeps its tokens, one that is finished
    is never generated again, and the reward is asked when the response is whole.

    Args:
        engine: which samples; None for a loop that calls something else.
        adapter: the name of an adapter of the engine, which is then the policy: it samples, its version is stamped on the tokens, and
            `self.engine` is `engine.with_adapter(adapter)`. It need not be there yet. None: the model itself.
        reward: gives the score of a finished rollout; None leaves it unscored. A `RewardSet` with functions of whole groups is asked
            as a `group_reward`.
        group_reward: in its place, gives the scores of a group's finished rollouts, in order; asked when all are finished.
        min_group_size: a rollout that failed for good fails its group, since that needs all its members; with this it is
            left out (`RolloutState.left_out`), and the group kept, while so many others can still be finished.
        sampling: parameters for all prompts; a row's `sampling` overrides them.
        reward_timeout: seconds for one judgement; the functions of a `RewardSet`, and what asks a server or processes, have their own.
        max_attempts: after so many failures a rollout is failed for good.
        back_off: seconds before the second attempt, doubled for each further one, up to 30.
    """

    def __init__(
        self,
        engine: Engine | None = None,
        reward: Reward | None = None,
        *,
        adapter: str | None = None,
        group_reward: GroupReward | None = None,
        min_group_size: int | None = None,
        sampling: SamplingParams | None = None,
        reward_timeout: float = 60.0,
        max_attempts: int = 3,
        back_off: float = _BACK_OFF,
    ) -> None:
        _check_parts(engine, reward, group_reward, sampling)
        if min_group_size is not None and whole("min_group_size", min_group_size) < 1:
            raise ValueError(f"min_group_size={min_group_size} would keep groups of nothing; it must be 1 or more")
        if whole("max_attempts", max_attempts) < 1:
            raise ValueError(f"max_attempts={max_attempts} allows no attempt; it must be 1 or more")
        if number("reward_timeout", reward_timeout) <= 0:
            raise ValueError(f"reward_timeout={reward_timeout} s leaves no time; it must be above 0")
        if number("back_off", back_off) < 0:
            raise ValueError(f"back_off={back_off} s is negative; it must be 0 or more")
        if adapter is not None and engine is None:
            raise ValueError(f"adapter={adapter!r:.60} needs an engine that has it; pass engine=")
        self.engine = engine if engine is None or adapter is None else engine.with_adapter(adapter)
        self.reward, self.group_reward = by_kind(reward, group_reward)
        self._min_group_size = min_group_size
        self.sampling = sampling or SamplingParams()
        self._reward_timeout, self._max_attempts, self._back_off = reward_timeout, max_attempts, back_off
        self._running: set[int] = set()
        self._stopping: set[int] = set()
        self._requests: dict[int, set[str]] = {}
        self._threads = asyncio.Semaphore(REWARD_THREADS)
        self._call_offs = CallOffs()
        # By identity: rollouts of two buffers may have one id.
        self._watchers: dict[int, Watcher] = {}
        self._generating: dict[int, Watcher | None] = {}
        self._decoding: dict[int, Decoding] = {}

    @abstractmethod
    async def generate(self, state: RolloutState) -> RolloutState:
        """Extend the response of `state` until it is whole, or until `extend` says "abort"; set `finish_reason`.

        A continued rollout, and one that is tried again, arrives with its earlier tokens in place. Raising fails this attempt.
        """

    def check_initialised(self) -> None:
        """Raise `TypeError` if a subclass has an `__init__` that does not call ours."""
        if not hasattr(self, "_running"):
            name = type(self).__name__
            raise TypeError(f"{name}.__init__ does not call super().__init__(engine, reward, ...); call it, even with nothing to pass")

    async def generate_group(self, group: RolloutGroup) -> RolloutGroup:
        """Run every member that is not completed; each ends completed, interrupted or failed.

        Cancelling it interrupts the members; their tokens so far stay in `group`.

        Raises:
            EngineDeadError: the engine is gone; unfinished members are interrupted.
            EngineClosedError: it is not open, likewise.
        """
        self.check_initialised()
        self._running.add(group.group_id)
        try:
            async with asyncio.TaskGroup() as members:
                for index, state in enumerate(group.rollouts):
                    if state.status is not Status.COMPLETED:
                        state.status = Status.RUNNING
                        members.create_task(self._run_member(group, index))
            if self._min_group_size is not None:
                leave_out_failed(group, self._min_group_size)
            if self.group_reward is not None and waits_for_judgement(group):
                async with asyncio.TaskGroup() as judging:
                    judging.create_task(self._judge_members(group, self.group_reward))
        except BaseExceptionGroup as errors:
            error = first_error(errors)
            raise error from error.__cause__
        finally:
            self._running.discard(group.group_id)
            self._stopping.discard(group.group_id)
            for state in group.rollouts:
                if state.status is Status.RUNNING:  # cancelled before its task began, or whole in a group that was not judged
                    interrupt(state)
            if self._min_group_size is not None:
                leave_out_failed(group, self._min_group_size)
        return group

    async def interrupt(self, group_ids: Collection[int]) -> None:
        """Ask the groups' members to stop where they are; `generate_group` then returns soon, with their tokens."""
        # Only those that run: a mark left on a group that just ended would stop its next run.
        self._stopping.update(self._running.intersection(group_ids))
        requests = [request for group_id in group_ids for request in self._requests.get(group_id, ())]
        # A response that waits for a slow judge is stopped too: it is whole, and only the judging is repeated.
        self._call_offs.call_off(self._stopping.intersection(group_ids))
        if self.engine is not None and requests:
            await self.engine.interrupt(requests)

    def watch(self, group: RolloutGroup, watcher: Watcher) -> None:
        """Tell `watcher` how the group gets on, from its next run to `unwatch`."""
        self._watchers[id(group)] = watcher

    def unwatch(self, group: RolloutGroup) -> None:
        """Tell nobody any more; again is nothing."""
        self._watchers.pop(id(group), None)

    def snapshot(self, group: RolloutGroup) -> RolloutGroup:
        """A copy of the group as it stands now, to be stored while it runs.

        Responses hold what was decoded so far, of requests under way too (their versions as the engine has told them so far).
        One whose `generate` has not returned is not finished, whatever it says.
        """
        rollouts = [standing(state, self._decoding.get(id(state)), finished=id(state) not in self._generating) for state in group.rollouts]
        return replace(group, rollouts=rollouts)

    def interrupted(self, state: RolloutState) -> bool:
        """Whether this rollout was asked to stop; long loops without engine calls look here."""
        return state.group_id in self._stopping

    async def extend(self, state: RolloutState, sampling: SamplingParams | None = None) -> FinishReason:
        """Sample on from the prompt and the response so far, append what comes, and say why it ended.

        The engine is shown `state.media` with the tokens, each time all of them; one without images refuses the rollout.
        The engine is not asked when the response is at its limit ("length"), ends in a stop token already
        ("stop"), or was asked to stop ("abort"). `sampling.max_tokens` bounds the whole response.

        Where the request fails or is cancelled midway, what was decoded of it is appended before the error is raised. Of a response
        with `structured_outputs` that did not come to its end nothing is kept: no engine can go on in the middle of a structure.
        """
        if self.engine is None:
            raise RuntimeError("this agent loop has no engine to extend a rollout with; pass engine=")
        if state.prompt_ids is None:
            raise RequestRefusedError(f"rollout {state.rollout_id} has no prompt_ids; encode its prompt first")
        params = self._params(state, sampling or self.sampling)
        ended = self._ended_already(state, params)
        if ended is not None:
            return ended
        left = params.max_tokens - int(state.response_ids.size)
        params = params.of_request(left, _request_seed(params.seed, state))
        ids = np.concatenate([state.prompt_ids, state.response_ids]) if state.response_ids.size else state.prompt_ids
        completion = await self._decoded(state, ids, params)
        if completion.finish_reason != "abort" or params.structured_outputs is None:
            state.append(completion.token_ids, logprobs=completion.logprobs, version=completion.versions)
        return completion.finish_reason

    async def _decoded(self, state: RolloutState, ids: NDArray[np.int32], params: SamplingParams) -> Completion:
        """The completion of a request, whose tokens `snapshot` sees as they come, and which `interrupt` reaches."""
        assert self.engine is not None
        whole = params.structured_outputs is not None
        decoding = self._decoding[id(state)] = Decoding(state.index, self._generating.get(id(state)), whole=whole)
        # Numbered: another buffer's rollout may have the same id in the same engine.
        request_id = f"{state.rollout_id}-{next(_REQUEST_NUMBERS)}"
        requests = self._requests.setdefault(state.group_id, set())
        # Known before the first await: an interrupt that comes while the request is on its way must reach it.
        requests.add(request_id)
        try:
            completion = await self.engine.generate(
                ids, params, request_id=request_id, session_id=state.rollout_id, media=state.media or None, on_tokens=decoding
            )
        except BaseException:
            with suppress(ValueError):  # tokens that no rollout takes must not hide what ended the request
                decoding.append_to(state)
            raise
        finally:
            requests.discard(request_id)
            if not requests:
                self._requests.pop(state.group_id, None)
            if self._decoding.get(id(state)) is decoding:
                del self._decoding[id(state)]
        decoding.check(completion)
        return completion

    def _params(self, state: RolloutState, sampling: SamplingParams) -> SamplingParams:
        try:
            return sampling.overridden(state.sampling)
        except (TypeError, ValueError) as error:
            raise RequestRefusedError(f"the `sampling` of this prompt's row: {error}") from error

    def _ended_already(self, state: RolloutState, params: SamplingParams) -> FinishReason | None:
        assert self.engine is not None
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else self.engine.eos_token_ids)
        # Only a sampled token ends a response: a tool may well say EOS.
        if state.response_ids.size and state.loss_mask[-1] == 1 and int(state.response_ids[-1]) in ends:
            return "stop"
        if state.response_ids.size >= params.max_tokens:
            return "length"
        return "abort" if self.interrupted(state) else None

    async def _run_member(self, group: RolloutGroup, index: int) -> None:
        state, watcher, failed = group.rollouts[index], self._watchers.get(id(group)), False
        while True:
            try:
                if failed:
                    await self._back_off_after(state)
                if not state.finished:
                    state = group.rollouts[index] = await self._generated(state, watcher)
                state.status = await self._settled(state)
                break
            except CalledOffError:
                interrupt(state)
                break
            except (EngineDeadError, EngineClosedError, asyncio.CancelledError):
                interrupt(state)
                raise
            except Exception as error:  # noqa: BLE001 - the one place where an exception becomes a failed rollout
                if self._failed_for_good(state, error):
                    break
                failed = True
        if watcher is not None and state.status is not Status.INTERRUPTED:
            watcher.ended(index)

    async def _generated(self, state: RolloutState, watcher: Watcher | None) -> RolloutState:
        """What `generate` made of `state`; only one that returns, and says why the response ends, can have finished it."""
        state.finish_reason = None
        self._generating[id(state)] = watcher
        try:
            returned = _same_rollout(state, await self.generate(state))
        except BaseException:
            state.finish_reason = None  # as of a first turn, after which another was to come
            raise
        finally:
            del self._generating[id(state)]
        if returned.finish_reason not in _FINISH_REASONS and not self.interrupted(state):
            given, returned.finish_reason = returned.finish_reason, None
            raise ValueError(
                f"generate left finish_reason={given!r}; it must set one of {_FINISH_REASONS} ('abort' where it was interrupted)"
            )
        return returned

    async def _settled(self, state: RolloutState) -> Status:
        """The status of a member whose `generate` returned; a whole response is judged first."""
        if not state.finished:
            interrupt(state)
            return state.status
        if self.interrupted(state):  # as its request ended: what calls waits off has passed. A judge that does not wait still may
            asyncio.get_running_loop().call_soon(lambda: self._call_offs.call_off(self._stopping.intersection((state.group_id,))))
        if self.group_reward is not None:
            if isinstance(self.group_reward, RewardSet):
                await self._call_offs.unless_called_off(state.group_id, self.group_reward.begin(state))
            return Status.RUNNING  # until its siblings are whole: they are judged together
        if self.reward is not None:
            judgement = judge(self.reward, state, timeout=self._reward_timeout, threads=self._threads)
            (await self._call_offs.unless_called_off(state.group_id, judgement)).apply_to(state)
        state.error = None
        return Status.COMPLETED

    async def _judge_members(self, group: RolloutGroup, reward: GroupReward) -> None:
        """Complete the members with their scores, or fail them with the reason; called off, they are left as they are."""
        seen = without_left_out(group)
        waiting = [state for state in seen.rollouts if state.status is Status.RUNNING]
        first = min(waiting, key=lambda state: state.attempts)  # the judgement's attempts are those that all have in common
        while not self.interrupted(first):
            try:
                judgement = judge_group(reward, seen, timeout=self._reward_timeout, threads=self._threads)
                judgements = await self._call_offs.unless_called_off(group.group_id, judgement)
            except CalledOffError:
                return
            except RewardError as error:
                for state in waiting:
                    record_failure(state, error)
                if first.attempts >= self._max_attempts:
                    fail_unjudged(group)
                    return
            else:
                for state, one in zip(seen.rollouts, judgements, strict=True):
                    one.apply_to(state)
                    state.status, state.error = Status.COMPLETED, None
                return
            with suppress(CalledOffError):
                await self._back_off_after(first)

    async def _back_off_after(self, state: RolloutState) -> None:
        """Wait before the next attempt."""
        seconds = self._back_off * 2.0 ** min(state.attempts - 1, 60)
        longest = max(self._back_off, _LONGEST_BACK_OFF)
        await self._call_offs.unless_called_off(state.group_id, asyncio.sleep(min(seconds, longest)))

    def _failed_for_good(self, state: RolloutState, error: Exception) -> bool:
        """Write the failure down; whether the rollout is failed for good, or interrupted meanwhile."""
        record_failure(state, error)
        if isinstance(error, RequestRefusedError) or state.attempts >= self._max_attempts:
            state.status = Status.FAILED
            return True
        if self.interrupted(state):
            interrupt(state)
            return True
        return False


def _check_parts(engine: object, reward: object, group_reward: object, sampling: object) -> None:
    """Refuse what would only fail once per prompt, an attempt after the other."""
    if engine is not None and (isinstance(engine, type) or not hasattr(engine, "generate")):
        raise TypeError(f"engine={engine!r:.80} is no engine; pass an open one, as `async with VLLMEngine(model) as engine` gives it")
    if reward is not None and not callable(reward):
        raise TypeError(f"reward={reward!r:.80} is no function of a rollout")
    if group_reward is not None and not callable(group_reward):
        raise TypeError(f"group_reward={group_reward!r:.80} is no function of a group")
    if reward is not None and group_reward is not None:
        raise ValueError("reward and group_reward would both give the score; pass one: a group reward may ask any other for each rollout")
    if sampling is not None and not isinstance(sampling, SamplingParams):
        raise TypeError(f"sampling={sampling!r:.80} is no SamplingParams; pass SamplingParams(max_tokens=...)")


def _request_seed(seed: int | None, state: RolloutState) -> int | None:
    """A seed of its own for each request: members of a group must differ, and so must a continuation's noise."""
    if seed is None:
        return None
    name = f"{seed}/{state.task_name}/{state.group_id}/{state.index}/{state.response_ids.size}"
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") & 0x7FFFFFFF


def _same_rollout(given: RolloutState, returned: object) -> RolloutState:
    if returned is given:
        return given
    if not isinstance(returned, RolloutState) or returned.rollout_id != given.rollout_id:
        raise TypeError(f"generate returned {returned!r:.80} for rollout {given.rollout_id}; it must return the state it was given")
    return returned
