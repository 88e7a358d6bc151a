"""`Scorer`: log-probabilities, entropies and values of given tokens by transformers models, packed, in bounded memory.

It needs torch (extra `torch`); `EngineScorer` asks engines instead.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from agent_loop.arguments import at_least, flag, function, one_of, positive
from agent_loop.sampling import whole
from buffer.rollout import RolloutGroup
from producer.experience.attached import Attached
from producer.experience.packed_model import AUTOCASTS, PackedModel, Row, check_loaded
from producer.experience.packing import first_fit_decreasing
from producer.experience.scorable import scorable

Floats = NDArray[np.float32]
Tensor = Any
HEADS = ("score", "v_head", "value_head", "classifier")
"""Where a critic has what maps a hidden state to a value: transformers' classifiers, TRL's value models, and others."""


@dataclass(frozen=True, eq=False)
class Scores:
    """What models say of one sequence: (tokens from `start` on,) float32 each, None where no model was asked.

    Attributes:
        logprobs: of each token after those before it, natural log, at the scorer's temperature.
        reference: likewise, by the reference.
        values: of each token: what the critic expects before it is drawn.
        entropy: of the distribution that each token was drawn from, in nats.
    """

    logprobs: Floats | None = None
    reference: Floats | None = None
    values: Floats | None = None
    entropy: Floats | None = None


class Scorer:
    """Scores sequences by a model, a reference and a critic, each optional.

    Sequences are packed into rows without padding; none sees another, which is checked on the model itself before it is first
    used. Logits are made for a few tokens at a time, and only for tokens that are asked for. Models stay in the mode they are in. Calls are
    synchronous and one at a time: from an event loop, `await asyncio.to_thread(scorer.attached, groups)`.
    """

    def __init__(
        self,
        model: Any = None,
        *,
        reference: Any | Literal["adapter_off"] = None,
        critic: Any = None,
        value_head: Any = None,
        temperature: float = 1.0,
        token_budget: int = 8192,
        packed: bool = True,
        autocast: Literal["bfloat16", "float16"] | None = None,
        logit_bytes: int = 128 << 20,
    ) -> None:
        """Say which models; they are where, and of the type, that they are to be read in.

        Args:
            model: the policy that is trained: a causal language model of transformers.
            reference: another one, or "adapter_off": the same with its adapters switched off, which peft's models can do.
            critic: a sequence or token classifier with one label, or TRL's value model.
            value_head: in place of the critic's own head; without a critic, it reads the hidden states of `model`.
            temperature: at which the tokens were sampled; logits are divided by it. The reference's too.
            token_budget: tokens of a row. A longer sequence has a row to itself. Attention that works with a mask ("sdpa", "eager") takes
                memory by its square.
            packed: False reads sequences one by one, for models that let packed ones see each other: those with a state in place of
                attention, and those that do not go by positions.
            autocast: as training is done, where that is under `torch.autocast`.
            logit_bytes: the most that logits may take at once.

        Raises:
            ValueError: there is no model, one has no head, or a number is out of bounds.
        """
        positive("temperature", temperature)
        at_least("token_budget", token_budget, 1)
        at_least("logit_bytes", logit_bytes, 1)
        flag("packed", packed)
        one_of("autocast", autocast, (*AUTOCASTS, None))
        if model is None and reference is None and critic is None:
            raise ValueError("a Scorer needs a model, a reference or a critic")
        if isinstance(reference, str) and (reference != "adapter_off" or not hasattr(model, "disable_adapter")):
            raise ValueError(f"{reference=}: it must be a model, or 'adapter_off' with a model that has a disable_adapter(), as peft's do")
        for name, one in (("model", model), ("reference", None if isinstance(reference, str) else reference), ("critic", critic)):
            if one is not None:
                check_loaded(name, one)
        if value_head is not None:
            function("value_head", value_head, "a module from hidden states to one number a token")
        if value_head is not None and critic is None and model is None:
            raise ValueError("a value_head reads hidden states; give the critic or the model that they are of")
        self.temperature, self.token_budget, self.packed = float(temperature), token_budget, packed
        options: dict[str, Any] = {"autocast": autocast, "logit_bytes": logit_bytes}
        self._model = None if model is None else PackedModel(model, **options)
        self._reference = None if reference is None or isinstance(reference, str) else PackedModel(reference, **options)
        self._adapter_off = isinstance(reference, str)
        self._critic = None if critic is None else PackedModel(critic, head=value_head or head_of(critic), **options)
        self._shared = None if value_head is None or critic is not None else PackedModel(model, head=value_head, **options)
        self._checked = False

    def score(
        self, sequences: Sequence[ArrayLike], starts: SupportsIndex | Sequence[SupportsIndex] = 1, *, entropy: bool = False
    ) -> list[Scores]:
        """Scores of each sequence, in order.

        Args:
            sequences: token ids.
            starts: the first token that is scored, of all or of each; that of the response, where a prompt comes before it.
            entropy: also by the model.

        Raises:
            ValueError: ids that are none, no token from `start` on, or a model that cannot be read packed.
        """
        ids = [_ids(number, given, self._vocab_size) for number, given in enumerate(sequences)]
        firsts = [whole("starts", one) for one in ([starts] * len(ids) if isinstance(starts, SupportsIndex) else starts)]
        _check_starts(ids, firsts)
        self._check()
        found = [Scores()] * len(ids)
        for numbers in rows_of([one.size for one in ids], self.token_budget if self.packed else 1):
            row, counts = _row([ids[number] for number in numbers], [firsts[number] for number in numbers])
            for number, one in zip(numbers, self._split(self._read(row, entropy), counts), strict=True):
                found[number] = one
        return found

    def attached(self, groups: Iterable[RolloutGroup], *, version: int | None = None) -> Attached:
        """What `make_experience` takes: of all rollouts that can be trained on, every token of the response.

        Args:
            version: of the weights that `model` has now.

        Raises:
            ValueError: as `score`; or a rollout has media, which a scorer cannot show to a model.
        """
        rollouts = list(scorable(groups))
        scored = self.score([one.token_ids for one in rollouts], [one.start for one in rollouts])
        by_id = dict(zip([one.rollout_id for one in rollouts], scored, strict=True))

        def of(name: str) -> dict[str, ArrayLike]:
            return {key: values for key, one in by_id.items() if (values := getattr(one, name)) is not None}

        return Attached(of("reference"), of("values"), trainer=of("logprobs"), version=version, temperature=self.temperature)

    @property
    def _vocab_size(self) -> int:
        return min(one.vocab_size for one in (self._model, self._reference, self._critic) if one is not None)

    def _check(self) -> None:
        """Once: weights change, what a model does with them does not."""
        for model, causal in () if self._checked else ((self._model, True), (self._reference, True), (self._critic, False)):
            if model is not None:
                model.check(causal=causal, packed=self.packed)
        self._checked = True

    def _read(self, row: Row, entropy: bool) -> dict[str, Tensor]:
        read: dict[str, Tensor] = {}
        if self._model is not None:
            with self._model.reading():
                hidden = self._model.hidden(row)
                read["logprobs"], entropies = self._model.logprobs(hidden, row.targets, self.temperature, entropy=entropy)
                if entropies is not None:
                    read["entropy"] = entropies
                if self._shared is not None:
                    read["values"] = self._shared.values(hidden)
        reference = self._model if self._adapter_off else self._reference
        if reference is not None:
            with reference.whole.disable_adapter() if self._adapter_off else nullcontext(), reference.reading():
                read["reference"], _ = reference.logprobs(reference.hidden(row), row.targets, self.temperature, entropy=False)
        if self._critic is not None:
            with self._critic.reading():
                read["values"] = self._critic.values(self._critic.hidden(row))
        return read

    @staticmethod
    def _split(read: dict[str, Tensor], counts: Sequence[int]) -> list[Scores]:
        bounds = np.cumsum(counts)[:-1]
        parts = {name: np.split(values.cpu().numpy(), bounds) for name, values in read.items()}
        return [Scores(**{name: parts[name][number] for name in parts}) for number in range(len(counts))]


def head_of(critic: Any) -> Any:
    """What maps a critic's hidden states to values.

    Raises:
        ValueError: it has none that is known, or one of several labels.
    """
    head = next((getattr(critic, name) for name in HEADS if getattr(critic, name, None) is not None), None)
    if head is None:
        raise ValueError(f"{type(critic).__name__} has none of {HEADS}; pass value_head=, a module from hidden states to one number")
    labels = getattr(head, "out_features", 1)
    if labels != 1:
        raise ValueError(f"the head of {type(critic).__name__} gives {labels} numbers a token; a critic gives 1, make it with num_labels=1")
    return head


def rows_of(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows of sequence numbers within the budget; a sequence that is longer has a row to itself."""
    fit = [number for number, length in enumerate(lengths) if length <= budget]
    rows = [[fit[place] for place in row] for row in first_fit_decreasing([lengths[number] for number in fit], budget)]
    return rows + [[number] for number, length in enumerate(lengths) if length > budget]


def _row(sequences: Sequence[NDArray[np.int64]], firsts: Sequence[int]) -> tuple[Row, list[int]]:
    """A row, and how many of its tokens are asked for of each sequence."""
    lengths = [one.size for one in sequences]
    begins = np.cumsum([0, *lengths])
    at = [np.arange(begin + first - 1, begin + length - 1) for begin, first, length in zip(begins, firsts, lengths, strict=False)]
    return Row(np.concatenate(sequences), tuple(lengths), np.concatenate(at)), [one.size for one in at]


def _ids(number: int, given: ArrayLike, vocab_size: int) -> NDArray[np.int64]:
    array = np.asarray(given)
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"sequence {number} holds {array.dtype}, not token ids; give whole numbers")
    ids = array.astype(np.int64).reshape(-1)
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"sequence {number} holds ids from {ids.min()} to {ids.max()}, outside the vocabulary of {vocab_size}")
    return ids


def _check_starts(ids: Sequence[NDArray[np.int64]], firsts: Sequence[int]) -> None:
    if len(firsts) != len(ids):
        raise ValueError(f"{len(firsts)} starts for {len(ids)} sequences; give one a sequence")
    for number, (one, first) in enumerate(zip(ids, firsts, strict=True)):
        if not 1 <= first < one.size:
            raise ValueError(
                f"sequence {number} has {one.size} tokens and start={first}; the first token has nothing before it, and one token "
                "or more must be left to score"
            )
