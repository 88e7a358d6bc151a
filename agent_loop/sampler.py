"""`Sampler`: the batch face of any engine, for evaluation, scripts, notebooks and trainers of one's own."""

import asyncio
import hashlib
import itertools
import secrets
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from agent_loop.chat import Tokenizer, template_of
from agent_loop.engines.adapters import Adapter
from agent_loop.engines.base import Engine, WeightSource
from agent_loop.errors import AgentLoopError, EngineClosedError, EngineDeadError, RequestRefusedError, first_error
from agent_loop.loop_thread import LoopThread, call
from agent_loop.rewards import GroupReward, Reward, by_kind
from agent_loop.sample_inputs import Input, Prompt, as_list, prompt_of
from agent_loop.sample_scores import Judge
from agent_loop.samples import SampledSequence, SampleResponse
from agent_loop.sampling import SamplingParams, number, seed_number, whole

MOST_SAMPLES = 1 << 16
"""Of an input, in one call: each is a task, and all begin at once."""

_NUMBERS = itertools.count()

Result = TypeVar("Result")


class Sampler:
    """Draws completions from an engine: one or many inputs in, a `SampleResponse` for each out, in order.

    `async with Sampler(engine)`, or `with Sampler(engine)` where nothing is async, opens the engine and closes it at the end.
    Over an engine that is open already, use the sampler as it is.

    Args:
        engine: any.
        tokenizer: encodes text and chats, and decodes responses; None where inputs are token ids and no text is wanted.
        seed: of requests whose parameters bring none, from 0 to 2**63 - 1; None draws one.

    Raises:
        TypeError: no engine, or no tokenizer.
        ValueError: a seed out of bounds.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None = None, *, seed: int | None = None) -> None:
        if not isinstance(engine, Engine):
            raise TypeError(f"engine={engine!r:.80} is no Engine; pass one, such as VLLMEngine(model)")
        if tokenizer is not None and not hasattr(tokenizer, "decode"):
            raise TypeError(f"tokenizer={tokenizer!r:.80} has no decode; pass a tokenizer of transformers, or one like it")
        self.engine, self.tokenizer = engine, tokenizer
        self._seed = secrets.randbits(62) if seed is None else seed_number("seed", seed)
        self._drawn = itertools.count()
        self._template: Any = None
        self._thread: LoopThread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        with suppress(RuntimeError):
            self._loop = asyncio.get_running_loop()

    # Its life

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        await self.engine.open()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.engine.close()

    def __enter__(self) -> Self:
        self.open_sync()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close_sync()

    def open_sync(self) -> None:
        """Open the engine on an event loop of its own, on a thread; as `with` does, for notebooks, whose cells outlive no block."""
        if self._thread is not None:
            raise RuntimeError("this sampler is open already; close_sync() closes it")
        thread = LoopThread()
        try:
            call(thread.loop, self.engine.open())
        except BaseException:
            thread.stop()
            raise
        self._thread, self._loop = thread, thread.loop

    def close_sync(self) -> None:
        """Close the engine and end the thread of `open_sync`; again does nothing."""
        thread, self._thread = self._thread, None
        if thread is not None:
            try:
                call(thread.loop, self.engine.close())
            finally:
                self._loop = None
                thread.stop()

    # Sampling

    async def sample(
        self,
        inputs: Input | Sequence[Input],
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        adapter_name: str = "",
        num_samples: int = 1,
        *,
        prompt_logprobs: bool = False,
        use_base_model: bool = False,
    ) -> list[SampleResponse]:
        """Sample `num_samples` responses to each input, all at once.

        Every request has a seed of its own, made from the seed of `sampling_params`, the input's number and the sample's; the very
        first has that seed itself. Cancelling the call frees all its requests in the engine.

        Args:
            inputs: one or many of: token ids (list, array, or a row with `prompt_ids`), a chat (a list of messages, or a row with
                `messages` and maybe `tools`), or a row with text as `prompt`. A row's `sampling` overrides the parameters. Images are
                parts of messages, `{"type": "image", "image": ...}`, or a row's `images`, in order, each as `Engine.generate` takes it.
            sampling_params: an object, or a mapping of its fields; None takes the defaults.
            adapter_name: of an adapter of the engine, whose newest version samples all of this call. "" is the sampler's engine as it is.
            num_samples: from 1 to 65536.
            prompt_logprobs: also score the prompts, which needs an engine with `capabilities.score`.
            use_base_model: with every adapter off, whatever `adapter_name` says and the sampler's engine is made with.

        Returns:
            One response for each input, in order; `[]` for no inputs.

        Raises:
            RequestRefusedError: an input that can never succeed, named by its number, before anything is generated; or an adapter that is
                not there.
            EngineError: a request failed; the others are cancelled.
        """
        asked = Asked(adapter_name, use_base_model, num_samples, prompt_logprobs)
        return [response for _, response in await self._sampled(inputs, sampling_params, asked)]

    def sample_sync(
        self,
        inputs: Input | Sequence[Input],
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        adapter_name: str = "",
        num_samples: int = 1,
        *,
        prompt_logprobs: bool = False,
        use_base_model: bool = False,
    ) -> list[SampleResponse]:
        """`sample` for callers that are not async.

        It works inside `with` (or after `open_sync`), also where an event loop runs, as in a notebook: the engine has a loop on a
        thread of its own. And it works from another thread than that of the event loop that opened the engine.

        Raises:
            RuntimeError: called on the engine's own event loop, which it would block for ever: await `sample` there.
            EngineClosedError: no event loop has the engine open.
        """
        options: dict[str, Any] = {"num_samples": num_samples, "prompt_logprobs": prompt_logprobs, "use_base_model": use_base_model}
        return self._sync(lambda: self.sample(inputs, sampling_params, adapter_name, **options))

    async def generate_from_prompts(
        self,
        prompts: str | Sequence[str],
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        adapter_name: str = "",
        *,
        num_samples: int = 1,
        use_base_model: bool = False,
    ) -> list[SampleResponse]:
        """`sample` for text: each prompt is encoded as it is, without a chat template."""
        if not isinstance(prompts, Iterable) or isinstance(prompts, Mapping):
            raise RequestRefusedError(f"prompts={prompts!r:.60} is no text, and no list of texts")
        listed = [prompts] if isinstance(prompts, str) else list(prompts)
        for place, prompt in enumerate(listed):
            if not isinstance(prompt, str):
                raise RequestRefusedError(f"prompt {place} is {prompt!r:.60}, no text; sample() takes token ids and chats")
        rows = [{"prompt": prompt} for prompt in listed]
        return await self.sample(rows, sampling_params, adapter_name, num_samples=num_samples, use_base_model=use_base_model)

    async def generate_and_score(
        self,
        inputs: Input | Sequence[Input],
        reward: Reward | None = None,
        sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        adapter_name: str = "",
        *,
        group_reward: GroupReward | None = None,
        num_samples: int = 1,
        reward_timeout: float = 60.0,
        use_base_model: bool = False,
    ) -> list[SampleResponse]:
        """`sample`, and have each sequence judged; see `agent_loop.rewards`.

        Rewards see a rollout as they do in training: `row` is the input's (so that answers beside the prompt are there), `text`,
        `response_ids`, `finish_reason`. A sequence whose reward fails has no `score`, and says why in `error`; one that was
        interrupted is not judged.

        Args:
            inputs: as of `sample`.
            reward: gives the score of one sequence. Either this or `group_reward`.
            sampling_params: as of `sample`.
            adapter_name: as of `sample`.
            group_reward: gives the scores of an input's finished sequences, in order.
            num_samples: 1 or more.
            reward_timeout: seconds for one judgement.
            use_base_model: as of `sample`.

        Raises:
            ValueError: none or both of the judges, or one that cannot be called; a bound is crossed. Otherwise as `sample`.
        """
        if (reward is None) == (group_reward is None):
            raise ValueError("generate_and_score needs one judge; pass either reward or group_reward")
        for name, judge in (("reward", reward), ("group_reward", group_reward)):
            if judge is not None and not callable(judge):
                raise ValueError(f"{name}={judge!r:.80} cannot be called; pass a function, such as one of a rollout that gives a number")
        if number("reward_timeout", reward_timeout) <= 0:
            raise ValueError(f"reward_timeout={reward_timeout} s leaves no time; it must be above 0")
        pairs = await self._sampled(inputs, sampling_params, Asked(adapter_name, use_base_model, num_samples))
        return await Judge(*by_kind(reward, group_reward), reward_timeout).all(pairs)

    async def add_adapter(self, name: str, path: WeightSource, version: int | None = None, *, keep: int = 2) -> Adapter:
        """Load a LoRA adapter into the engine, or a new version of one; see `Engine.add_adapter`. `sample` then takes its name."""
        return await self.engine.add_adapter(name, path, version, keep=keep)

    add_adapter_to_model = add_adapter

    async def remove_adapter(self, name: str) -> None:
        """Take all versions of an adapter out of the engine; see `Engine.remove_adapter`."""
        await self.engine.remove_adapter(name)

    def add_adapter_sync(self, name: str, path: WeightSource, version: int | None = None, *, keep: int = 2) -> Adapter:
        """`add_adapter` for callers that are not async; as `sample_sync`."""
        return self._sync(lambda: self.add_adapter(name, path, version, keep=keep))

    def set_template(self, template: Any = None) -> None:
        """Say how chats become token ids.

        Args:
            template: a jinja text, a class (made with the tokenizer) or an instance with `apply_chat_template`; None is the
                tokenizer's own, which is the default.

        Raises:
            ValueError: it has no `apply_chat_template`, or needs a tokenizer where there is none.
        """
        self._template = None if template is None else template_of(template, self.tokenizer)

    # Inside

    def _sync(self, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        loop = self._loop
        if loop is None or not loop.is_running():
            raise EngineClosedError("no event loop has this sampler's engine open; use `with sampler:` around it, or open_sync()")
        with suppress(RuntimeError):
            if asyncio.get_running_loop() is loop:
                loop = None
        if loop is None:
            raise RuntimeError("sample_sync would block the event loop that the engine runs on; `await sampler.sample(...)` here")
        return call(loop, work())

    async def _sampled(
        self, inputs: Input | Sequence[Input], given: SamplingParams | Mapping[str, Any] | None, asked: "Asked"
    ) -> list[tuple[Prompt, SampleResponse]]:
        if not 1 <= whole("num_samples", asked.num_samples) <= MOST_SAMPLES:
            raise ValueError(f"num_samples={asked.num_samples} is out of bounds; it must be from 1 to {MOST_SAMPLES}: call again for more")
        self._here()
        adapter = self.engine.check_adapter(asked.adapter_name) if asked.adapter_name else None
        if asked.prompt_logprobs and not self.engine.capabilities.score:
            raise RequestRefusedError(f"{type(self.engine).__name__} cannot score prompts; leave prompt_logprobs, or use another engine")
        params = given if isinstance(given, SamplingParams) else SamplingParams().overridden({} if given is None else given)
        prompts = [self._prompt(place, one, params) for place, one in enumerate(as_list(inputs))]
        if asked.prompt_logprobs and any(prompt.images for prompt, _ in prompts):
            raise RequestRefusedError("engines score tokens alone, and inputs hold images; leave prompt_logprobs")
        seed = self._seed_of(next(self._drawn)) if params.seed is None else params.seed
        # Held: one version samples and scores all of it, whatever is added meanwhile.
        policy = self.engine.base_model if asked.use_base_model else self.engine
        with nullcontext(policy) if adapter is None or asked.use_base_model else self.engine.hold_adapter(adapter) as engine:
            try:
                async with asyncio.TaskGroup() as tasks:
                    calls = [
                        tasks.create_task(self._respond(engine, place, prompt, how, seed, asked))
                        for place, (prompt, how) in enumerate(prompts)
                    ]
            except BaseExceptionGroup as errors:
                error = first_error(errors)
                raise error from error.__cause__
        return [(prompt, call.result()) for (prompt, _), call in zip(prompts, calls, strict=True)]

    def _here(self) -> None:
        """The running loop is the engine's: what an engine awaits belongs to one loop."""
        running = asyncio.get_running_loop()
        if self._loop is not None and self._loop is not running and self._loop.is_running():
            raise RuntimeError("the engine runs on another event loop than this; call sample_sync(), or open the engine on this one")
        self._loop = running

    def _prompt(self, place: int, given: Input, params: SamplingParams) -> tuple[Prompt, SamplingParams]:
        """An input and its parameters, checked."""
        try:
            prompt = prompt_of(given, self.tokenizer, self._template)
            self.engine.check_media(prompt.images)
            own = prompt.row.get("sampling")
            how = params.overridden({} if own is None else own)
            return replace(prompt, ids=self.engine.check_request(prompt.ids, how)), how
        except (RequestRefusedError, ValueError) as error:
            raise (RequestRefusedError if type(error) is ValueError else type(error))(f"input {place}: {error}") from error

    async def _respond(
        self, engine: Engine, place: int, prompt: Prompt, params: SamplingParams, seed: int, asked: "Asked"
    ) -> SampleResponse:
        try:
            own = seed if params.seed is None else params.seed
            sequences = await self._sequences(engine, prompt, params, (own, place), asked.num_samples)
            return SampleResponse(prompt.ids, sequences, await _scored(engine, prompt) if asked.prompt_logprobs else None)
        except (EngineDeadError, EngineClosedError):
            raise  # of all inputs
        except AgentLoopError as error:
            raise type(error)(f"input {place}: {error}") from error
        except Exception as error:
            error.add_note(f"input {place} of Sampler.sample")
            raise

    async def _sequences(
        self, engine: Engine, prompt: Prompt, params: SamplingParams, key: tuple[int, int], num_samples: int
    ) -> tuple[SampledSequence, ...]:
        """The responses to one input; what a sampler of another kind does otherwise."""
        try:
            async with asyncio.TaskGroup() as tasks:
                calls = [tasks.create_task(self._one(engine, prompt, params, (*key, number))) for number in range(num_samples)]
        except BaseExceptionGroup as errors:
            error = first_error(errors)
            raise error from error.__cause__
        return tuple(call.result() for call in calls)

    async def _one(self, engine: Engine, prompt: Prompt, params: SamplingParams, key: tuple[int, int, int]) -> SampledSequence:
        asked = params.of_request(params.max_tokens, _request_seed(*key))
        name, media = f"sampler-{next(_NUMBERS)}", prompt.images or None
        completion = await engine.generate(prompt.ids, asked, request_id=name, media=media)
        return SampledSequence.of(completion, self._text(completion.token_ids.tolist()))

    def _text(self, token_ids: list[int]) -> str | None:
        return None if self.tokenizer is None else self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def _seed_of(self, call: int) -> int:
        return _request_seed(self._seed, call, 0)


class Asked(NamedTuple):
    """What a call asks for, beside inputs and parameters."""

    adapter_name: str
    use_base_model: bool
    num_samples: int
    prompt_logprobs: bool = False


async def _scored(engine: Engine, prompt: Prompt) -> NDArray[np.float32]:
    """Log-probabilities of the prompt's tokens but the first: one alone has none."""
    return await engine.score(prompt.ids) if prompt.ids.size > 1 else np.empty(0, np.float32)


def _request_seed(seed: int, place: int, sample: int) -> int:
    """A seed of its own for each sample of each input; the very first keeps the given one."""
    if place == sample == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{place}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & 0x7FFF_FFFF_FFFF_FFFF
