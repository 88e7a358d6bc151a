"""`ClassifierReward`: a local reward model, a transformers sequence classifier (the extra `torch`)."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from agent_loop.arguments import at_least, function, instance, one_of, text
from agent_loop.errors import RewardError
from agent_loop.rewards.batching import MicroBatcher
from agent_loop.rewards.wire import Render
from buffer.rollout import RolloutState
from buffer.rows import drawn_messages

try:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
except ImportError as error:
    raise ImportError("a local reward model needs torch and transformers: pip install 'millrace[torch]'") from error

T = TypeVar("T")

DTYPES = ("float32", "bfloat16", "float16")


class ClassifierReward:
    """Scores rollouts by one logit of a sequence classifier, several at a time, on a thread of its own.

    A reward of one rollout, open while its `async with` lasts. Rollouts that come while the model works are its next batch. A
    rollout's score does not depend on what is in its batch but for rounding.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: Any = None,
        *,
        label: int | str = 0,
        device: str = "cpu",
        dtype: str = "float32",
        batch: int = 16,
        window: float = 0.005,
        max_length: int | None = None,
        render: Render | None = None,
    ) -> None:
        """Say which model; opening loads it.

        Args:
            model: a folder in Hugging Face's format, a name on its hub, or a loaded model, which nobody else may use meanwhile.
            tokenizer: of the model; a folder's or a hub's own is loaded.
            label: which logit is the score, by number or by the model's name for it.
            device: such as "cpu" or "cuda:1"; a loaded model keeps its own.
            dtype: "float32", "bfloat16" or "float16"; a loaded model keeps its own.
            batch: rollouts of one forward pass.
            window: seconds that the first of them waits for others.
            max_length: tokens of prompt and response; longer ones fail. None takes the model's.
            render: makes a text of a rollout. By default prompt and response, in the tokenizer's chat template where the prompt
                is a chat.

        Raises:
            ValueError: a bound is crossed, or a loaded model came without a tokenizer.
        """
        instance("model", model, str | Path | PreTrainedModel, "a folder, a name on the hub, or a loaded model")
        one_of("dtype", dtype, DTYPES)
        text("device", device, 'such as "cpu" or "cuda:1"')
        if not isinstance(label, str):
            at_least("label", label, 0)
        if isinstance(model, PreTrainedModel) and tokenizer is None:
            raise ValueError("a loaded model came without tokenizer=; pass the one that it was trained with")
        if max_length is not None:
            at_least("max_length", max_length, 1)
        if render is not None:
            function("render", render, "one that makes a text of a rollout")
        self.at_once = 2 * at_least("batch", batch, 1)  # while one is judged, the next is gathered
        self._source, self._tokenizer, self._label = model, tokenizer, label
        self._device, self._dtype, self._max_length, self._render = device, dtype, max_length, render or self._as_text
        self._batches = MicroBatcher[RolloutState, float](self._scores, most=batch, window=window, at_once=1)
        self._opened = AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._batches.check_closed()
        async with AsyncExitStack() as opening:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="millrace-classifier")
            opening.push_async_callback(asyncio.to_thread, self._thread.shutdown)  # it waits for the batch under way
            self._model = await self._on_thread(self._load)
            await opening.enter_async_context(self._batches)
            self._opened = opening.pop_all()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Ends the thread after the batch under way, which cannot be stopped."""
        await self._opened.__aexit__(kind, error, trace)

    async def __call__(self, rollout: RolloutState) -> float:
        """The model's score.

        Raises:
            RewardError: the rollout is too long or has no text, or it is not open.
        """
        return await self._batches(rollout)

    async def _scores(self, rollouts: list[RolloutState]) -> Sequence[float | Exception]:
        return await self._on_thread(self._judge, rollouts)

    async def _on_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    # On the thread

    def _load(self) -> PreTrainedModel:
        model = self._source if isinstance(self._source, PreTrainedModel) else self._loaded(self._source)
        if self._tokenizer is None:
            self._tokenizer = AutoTokenizer.from_pretrained(self._source)
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if self._tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has neither a padding nor an EOS token; give it one, so that texts can be judged together")
        # A decoder takes the logit of the last token that is no padding: it must know which that is.
        text_config = model.config.get_text_config()
        if text_config.pad_token_id is None:
            text_config.pad_token_id = self._tokenizer.pad_token_id
        self._padding = text_config.pad_token_id
        names = model.config.label2id
        number = names.get(self._label) if isinstance(self._label, str) else self._label
        if number is None or not 0 <= number < model.config.num_labels:
            raise ValueError(f"label={self._label!r} is none of the model's {model.config.num_labels} labels, {list(names)[:8]}")
        self._number = number
        self._max_length = self._max_length or getattr(text_config, "max_position_embeddings", None)
        return model.eval()

    def _loaded(self, source: str | Path) -> PreTrainedModel:
        dtype = getattr(torch, self._dtype)
        model, report = AutoModelForSequenceClassification.from_pretrained(source, dtype=dtype, output_loading_info=True)
        if missing := sorted(report["missing_keys"]):
            # transformers draws them at random and warns: scores would be noise.
            raise ValueError(f"{source} is no sequence classifier: its weights lack {missing[:4]}; train it as a reward model first")
        return model.to(self._device)

    def _judge(self, rollouts: list[RolloutState]) -> list[float | Exception]:
        encoded = [self._encoded(rollout) for rollout in rollouts]
        ids = [one for one in encoded if not isinstance(one, Exception)]
        scores = iter(self._logits(ids) if ids else [])
        return [one if isinstance(one, Exception) else next(scores) for one in encoded]

    def _encoded(self, rollout: RolloutState) -> list[int] | Exception:
        try:
            # A chat template writes its special tokens itself.
            ids = self._tokenizer.encode(self._render(rollout), add_special_tokens=rollout.messages is None)
        except Exception as error:  # noqa: BLE001 - raised for the one who asked for this rollout
            return error
        if not ids:
            return RewardError("prompt and response are empty")
        if self._max_length is not None and len(ids) > self._max_length:
            return RewardError(f"prompt and response are {len(ids)} tokens for the reward model, which takes {self._max_length}")
        return list(ids)

    def _as_text(self, rollout: RolloutState) -> str:
        if rollout.text is None:
            raise RewardError("the rollout has no text; give the agent loop a tokenizer")
        if rollout.messages is None:
            return (rollout.prompt or "") + rollout.text
        drawn = drawn_messages(rollout.row, rollout.messages) or []
        answered = len(rollout.messages) > len(drawn)  # the loop has added the response itself
        messages = rollout.messages if answered else [*rollout.messages, {"role": "assistant", "content": rollout.text}]
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False))

    def _logits(self, ids: list[list[int]]) -> list[float]:
        longest = max(map(len, ids))
        padded = [one + [self._padding] * (longest - len(one)) for one in ids]
        mask = [[1] * len(one) + [0] * (longest - len(one)) for one in ids]
        device = self._model.device
        with torch.inference_mode():
            logits = self._model(input_ids=torch.tensor(padded, device=device), attention_mask=torch.tensor(mask, device=device)).logits
        scores: list[float] = logits[:, self._number].float().tolist()
        return scores
