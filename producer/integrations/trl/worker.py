"""`AsyncRollouts`: the rollout worker and the weight transfer of TRL's `AsyncGRPOTrainer`, over a producer in the background.

on_train_begin -> init_weight_transfer -> (pause, send_weights, resume, update_model_version) ... -> start     the trainer's thread
resume the buffer -> wait for start -> next batch -> its samples into the queue -> wait until it is empty -> ...     the loop's
"""

import asyncio
import queue
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from typing import Any

from transformers import TrainerCallback

from agent_loop import AgentLoop
from agent_loop.engines.base import Engine, PauseMode
from agent_loop.errors import EngineError, first_error
from agent_loop.loop_thread import LoopThread, call
from agent_loop.sampling import whole
from producer.background import Producer
from producer.errors import ProducerError
from producer.experience import AdvantageConfig, preset
from producer.integrations.trl.samples import check_config, samples
from producer.prompts import PromptSampler
from producer.strategy import ProduceStrategy


class AsyncRollouts:
    """Samples for `AsyncGRPOTrainer`, produced in the background, each group stored and consumed at the step that trains on it.

    ```python
    buffer = ReplayBuffer.open("sqlite:///run.db")
    agent_loop = SingleTurnAgentLoop(VLLMEngine(model), tokenizer, reward=trl_reward(accuracy), sampling=SamplingParams(max_tokens=2048))
    strategy = AsyncProduceStrategy(buffer, staleness_threshold=2.0, max_staleness=2)
    rollouts = AsyncRollouts(strategy, agent_loop, ReplayPromptSampler(dataset, buffer, group_size=8), "math", groups_per_step=16)
    trainer = AsyncGRPOTrainer(
        model, args=args, train_dataset=dataset, rollout_worker=rollouts, weight_transfer=rollouts.weight_transfer,
        callbacks=[rollouts.callback],
    )
    ```

    The batch of a step is put into the trainer's queue when the one before it was drawn from it. The trainer draws a micro-batch ahead,
    hence a batch may be one update staler when it is trained on than when it was handed out, and `max_staleness` must leave
    that room: at least 1, and one less than the trainer's. A trainer that drops nothing as too stale is what keeps the accounts right.

    Args:
        strategy: over a buffer that is not open yet, with a bound on staleness.
        agent_loop: runs the groups, with a reward; its engine is not open yet either.
        sampler: draws the prompts.
        task_name: whose.
        groups_per_step: of one optimisation step; times the group size, the samples of a step.
        advantage: from rewards to advantages; by default as TRL's own worker has them.
        pause_mode: what becomes of responses in flight while weights are updated.
    """

    def __init__(
        self,
        strategy: ProduceStrategy,
        agent_loop: AgentLoop,
        sampler: PromptSampler,
        task_name: str,
        *,
        groups_per_step: int,
        advantage: AdvantageConfig | None = None,
        pause_mode: PauseMode = "keep",
    ) -> None:
        if whole("groups_per_step", groups_per_step) < 1:
            raise ValueError(f"groups_per_step={groups_per_step} trains on nothing; it must be 1 or more")
        if strategy.max_staleness is None or strategy.max_staleness < 1:
            raise ValueError(
                f"max_staleness={strategy.max_staleness}: the trainer draws ahead and drops what is too stale; give the strategy a bound "
                "of 1 or more, one below the trainer's"
            )
        if agent_loop.engine is None:
            raise ValueError("the agent loop has no engine whose weights could be kept in step; give it one")
        self._producer = Producer(strategy, agent_loop, sampler, task_name)
        self._strategy, self._engine, self._sampler = strategy, agent_loop.engine, sampler
        self._sampling, self._groups = agent_loop.sampling, groups_per_step
        self._config = check_config(advantage or preset("trl_async", "grpo"))
        self._pause_mode: PauseMode = pause_mode
        self._step, self._base, self._sent, self._bound = 0, 0, 0, 0
        self._told, self._begun = False, False
        self._thread: LoopThread | None = None
        self._life: Any = None
        self._failure: BaseException | None = None
        self._opened, self._ended = threading.Event(), threading.Event()
        self._updating = AsyncExitStack()
        self.rollout_buffer: queue.Queue[Any] = Outlet(self._drawn)
        """The queue that the trainer draws from."""
        self.metrics_queue: queue.Queue[dict[str, float]] = queue.Queue()
        """Metrics of each batch, which the trainer logs."""
        self.weight_transfer = WeightTransfer(self)
        """Pass it to the trainer in `weight_transfer`."""
        self.callback = _Callback(self)
        """Pass it to the trainer in `callbacks`."""

    # -- what the trainer's callback tells ----------------------------------------------------------------------

    def begin(self, step: int, args: Any) -> None:
        """Training begins, or goes on from the checkpoint of `step`, with these arguments of the trainer.

        Raises:
            ValueError: they do not fit, with what to change.
        """
        self._check_args(step, args)
        self._step, self._bound, self._told = step, args.max_staleness, True

    def _check_args(self, step: int, args: Any) -> None:
        size, bound = self._sampler.group_size, self._strategy.max_staleness or 0
        a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        checks = {
            f"num_generations={args.num_generations} is not the sampler's group_size={size}": args.num_generations != size,
            f"a step has {a_step} samples and groups_per_step={self._groups} groups of {size}": a_step != self._groups * size,
            f"token_budget={args.token_budget} makes steps of any number of samples, so that it is not known what a checkpoint was trained "
            "on; set token_budget=0": args.token_budget is None or args.token_budget > 0,
            f"max_staleness={args.max_staleness} would drop what is handed out at {bound} and drawn one update later; "
            f"set {bound + 1} or more": args.max_staleness <= bound,
            f"temperature={args.temperature} is not the agent loop's {self._sampling.temperature}": args.temperature
            != self._sampling.temperature,
            f"a run that goes on from step {step} would draw and throw away {step} batches; set ignore_data_skip=True": step > 0
            and not args.ignore_data_skip,
        }
        if wrong := [reason for reason, is_wrong in checks.items() if is_wrong]:
            raise ValueError("; ".join(wrong))

    def commit(self, step: int) -> None:
        """The checkpoint of `step` is on disk: what was trained on up to it is final."""
        call(self._loop, self._strategy.buffer.commit(step, version=self._engine.version))

    # -- TRL's weight transfer ----------------------------------------------------------------------------------

    def open(self) -> None:
        """Open the buffer and the engine, on a thread of their own, and rewind to the trainer's checkpoint."""
        if self._thread is not None:
            return
        if not self._told:
            raise ProducerError("the trainer never told that it began; pass callbacks=[rollouts.callback] to it")
        self._thread, self._begun, self._failure = LoopThread(), False, None
        self._opened.clear()
        self._ended.clear()
        self._life = asyncio.run_coroutine_threadsafe(self._live(), self._thread.loop)
        self._opened.wait()
        self._check_alive()

    def pause(self) -> None:
        """Hold production and the engine, before new weights come."""
        call(self._loop, self._updating.enter_async_context(self._producer.update_weights(mode=self._pause_mode)))

    def send_weights(self, weights: Iterator[tuple[str, Any]]) -> None:
        """Put new weights in force; the first time those that training begins with."""
        version = self._engine.version + 1 if self._sent else self._base
        call(self._loop, self._engine.update_weights(dict(weights), version))
        self._sent += 1

    def resume(self) -> None:
        """Go on, with them."""
        call(self._loop, self._updating.aclose())

    # -- TRL's rollout worker -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to produce; again is nothing."""
        self._check_alive()
        if not self._begun:
            self._begun = True
            self._loop.call_soon_threadsafe(self._start.set)

    def update_model_version(self, model_version: int) -> None:
        """The trainer's name for the weights that it sent last.

        Raises:
            ProducerError: others than were sent: another weight transfer is in use.
        """
        if model_version != self._sent:
            raise ProducerError(
                f"the trainer has model_version={model_version} and {self._sent} sets of weights came here; pass "
                "weight_transfer=rollouts.weight_transfer to it"
            )

    def check_health(self, stale_after_s: float) -> None:
        """Raise if production has failed, or the engine or the loop does not answer within `stale_after_s` seconds."""
        self._check_alive()
        answer = asyncio.run_coroutine_threadsafe(self._engine.health(), self._loop)
        try:
            answer.result(timeout=stale_after_s)
        except TimeoutError as error:
            raise RuntimeError(f"the rollouts did not answer within {stale_after_s} s") from error
        except EngineError:
            self._check_alive()  # it was closed since production failed: that is the error to raise
            raise

    def stop(self) -> None:
        """Stop what runs, which is stored, and close buffer and engine; again is nothing."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        with suppress(Exception):  # an update that was cut short holds the engine still
            call(thread.loop, self._updating.aclose())
        thread.loop.call_soon_threadsafe(self._life.cancel)
        self._ended.wait()
        thread.stop()
        self._told = False

    # -- beside the trainer -------------------------------------------------------------------------------------

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        if self._thread is None:
            raise ProducerError("these rollouts are not open; the trainer opens them by its weight_transfer when training begins")
        return self._thread.loop

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"producing rollouts has failed: {self._failure}") from self._failure
        if self._thread is None or self._ended.is_set():
            raise RuntimeError("no rollouts are produced: they were stopped, or never opened")

    async def _live(self) -> None:
        self._start, self._empty = asyncio.Event(), asyncio.Event()
        self._sent = 0
        try:
            async with self._strategy.buffer as buffer, self._engine, self._producer:
                self._base = (await buffer.resume(step=self._step)).version
                self._opened.set()
                await self._start.wait()
                try:
                    await self._feed()
                except Exception as error:
                    self._failure = error  # before anything is closed: whoever asks meanwhile is told this
                    raise
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - the last words go to the trainer, by check_health
            self._failure = self._failure or (first_error(error) if isinstance(error, BaseExceptionGroup) else error)
        finally:
            self._ended.set()
            self._opened.set()

    async def _feed(self) -> None:
        """The batch of each step into the queue, when that of the step before was drawn."""
        step = self._step
        while True:
            step += 1
            batch = await self._producer.next_batch(self._groups, step=step)
            version = self._engine.version
            self.metrics_queue.put_nowait({f"millrace/{name}": value for name, value in batch.metrics.items()})
            for sample in samples(batch.groups, self._config, version, version - self._base + 1):
                self.rollout_buffer.put_nowait(sample)
            await self._drained()

    async def _drained(self) -> None:
        """Wait until everything was drawn; it may have looked so before, while the samples were being put in."""
        while not self.rollout_buffer.empty():
            await self._empty.wait()
            self._empty.clear()

    def _drawn(self, sample: Any) -> None:
        """On the trainer's thread: it has drawn this one."""
        if self._sent - sample.model_version > self._bound:
            raise ProducerError(
                f"a sample of group {sample.group_id} is {self._sent - sample.model_version} updates old, and the trainer would drop it "
                f"(max_staleness={self._bound}): raise that, or lower the strategy's"
            )
        if self.rollout_buffer.empty():
            with suppress(RuntimeError):  # the loop is closed: training has ended
                self._loop.call_soon_threadsafe(self._empty.set)

    @property
    def engine(self) -> Engine:
        """Of the agent loop."""
        return self._engine


class Outlet(queue.Queue[Any]):
    """A queue that tells what is drawn from it."""

    def __init__(self, drawn: Any) -> None:
        super().__init__()
        self._drawn = drawn

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """The next item; see `queue.Queue`."""
        item = super().get(block, timeout)
        self._drawn(item)
        return item


class WeightTransfer:
    """TRL's weight transfer, by the engine of `AsyncRollouts`: in this process, or as that engine does it."""

    def __init__(self, rollouts: AsyncRollouts) -> None:
        self._rollouts = rollouts

    def init_weight_transfer(self) -> None:
        """Open what the weights go to."""
        self._rollouts.open()

    def pause(self) -> None:
        """Hold production and the engine."""
        self._rollouts.pause()

    def send_weights(self, iterator: Iterator[tuple[str, Any]]) -> None:
        """Hand on the model's tensors."""
        self._rollouts.send_weights(iterator)

    def resume(self) -> None:
        """Go on with the new weights."""
        self._rollouts.resume()

    def destroy(self) -> None:
        """Close everything."""
        self._rollouts.stop()


class _Callback(TrainerCallback):  # type: ignore[misc]
    """Tells the rollouts what the trainer does."""

    def __init__(self, rollouts: AsyncRollouts) -> None:
        self._rollouts = rollouts

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.is_world_process_zero:
            self._rollouts.begin(state.global_step, args)

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.is_world_process_zero:
            self._rollouts.commit(state.global_step)
