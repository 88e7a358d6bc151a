"""What serving costs in a simulated engine: `CostModel`, and the prefix cache that spares it prefills."""

import math
from collections import OrderedDict
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from agent_loop.sampling import whole

_SEED = 0x6D696C6C


@dataclass(frozen=True, slots=True)
class CostModel:
    """What a `SimulatedEngine` can do, and how long it takes.

    Each of b requests that decode at once gets `tokens_per_second / (1 + b / half_batch)`: a step that takes a fixed time and a
    little more for each request. Prompts are prefilled one after the other, beside the decoding; a request holds a slot during both.

    Attributes:
        slots: requests that run at once; others wait in order of arrival.
        tokens_per_second: of one request alone, on the event loop's clock. None: a token costs one turn of the loop.
        half_batch: requests at which each decodes half as fast; infinite: the batch does not matter.
        prefill_tokens_per_second: of the whole engine; infinite: prefills cost nothing.
        prefix_cache_tokens: the most tokens whose prefill is remembered, least recently used forgotten first; 0: none. It is emptied
            by weight updates. A request pays no prefill for the whole blocks at the beginning of its prompt that are remembered:
            those of the other members of its group, of its earlier turns, and of what it had sampled before an interruption.
        block_tokens: tokens of such a block.
        kv_tokens: the most tokens of context (prompt and response) of all running requests together; None: no limit. Where they would
            exceed it the youngest is preempted: it keeps its tokens, waits as the first, and its prefill is paid again. One request
            alone may exceed it.
        update_seconds: how long `update_weights` takes; nothing is prefilled or decoded meanwhile.
    """

    slots: int = 64
    tokens_per_second: float | None = None
    half_batch: float = math.inf
    prefill_tokens_per_second: float = math.inf
    prefix_cache_tokens: int = 0
    block_tokens: int = 16
    kv_tokens: int | None = None
    update_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("slots", 1), ("block_tokens", 1), ("prefix_cache_tokens", 0), ("kv_tokens", 1)):
            value = getattr(self, name)
            if value is not None and whole(name, value) < least:
                raise ValueError(f"{name}={value!r} must be {least} or more")
        for name in ("tokens_per_second", "half_batch", "prefill_tokens_per_second"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value!r} must be above 0")
        if not 0 <= self.update_seconds < math.inf:
            raise ValueError(f"update_seconds={self.update_seconds!r} must be 0 or more, and finite")
        if self.tokens_per_second == math.inf:
            raise ValueError("tokens_per_second=inf would end every response at once; give a finite rate, or None for a turn a token")
        if self.tokens_per_second is None and (self.half_batch < math.inf or self.prefill_tokens_per_second < math.inf):
            raise ValueError("half_batch and prefill_tokens_per_second are about time; give tokens_per_second with them")

    def rate(self, batch: int) -> float:
        """Tokens per second (per turn where `tokens_per_second` is None) of each of `batch` requests that decode at once."""
        alone = 1.0 if self.tokens_per_second is None else float(self.tokens_per_second)
        return alone / (1 + batch / self.half_batch)

    def prefill_seconds(self, tokens: int) -> float:
        """How long the prefill of so many tokens takes."""
        return tokens / self.prefill_tokens_per_second


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a simulated engine did since it was made, and what it does now.

    Attributes:
        running: requests that hold a slot.
        waiting: requests in flight that hold none yet.
        preemptions: how often a request lost its slot to others.
        tokens: sampled so far, those of running requests included.
        prefill_tokens: whose prefill was begun, repeated ones counted again.
        cached_tokens: whose prefill the prefix cache spared.
        busy_slot_seconds: time that slots were held while the engine was not paused, summed over slots; in turns of the loop where
            `tokens_per_second` is None. Divided by slots and elapsed time it is the engine's utilisation.
    """

    running: int
    waiting: int
    preemptions: int
    tokens: int
    prefill_tokens: int
    cached_tokens: int
    busy_slot_seconds: float

    def as_dict(self) -> dict[str, float]:
        """Name to value, as metrics want it."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class PrefixCache:
    """The blocks of tokens whose prefill is remembered; a block is known by all tokens up to its end."""

    def __init__(self, costs: CostModel) -> None:
        self._size, self._most = costs.block_tokens, costs.prefix_cache_tokens // costs.block_tokens
        self._blocks: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._factors: NDArray[np.uint64] = np.empty(0, np.uint64)

    def take(self, ids: NDArray[np.int32], salt: int = 0) -> int:
        """Remember a prompt; returns how many tokens at its beginning were remembered already, under this salt from 0 to 2^64 - 1.

        Its last one always needs a prefill.
        """
        if not self._most:
            return 0
        keys, hits = self._keys(ids, salt), 0
        while hits < len(keys) and keys[hits] in self._blocks:
            hits += 1
        self._put(keys)
        return min(hits * self._size, ids.size - 1)

    def put(self, ids: NDArray[np.int32], salt: int = 0) -> None:
        """Remember tokens that were computed otherwise."""
        if self._most:
            self._put(self._keys(ids, salt))

    def _put(self, keys: list[int]) -> None:
        # From the last to the first: a block is of no use without those before it, so those are forgotten later.
        for key in reversed(keys[: self._most]):
            self._blocks[key] = None
            self._blocks.move_to_end(key)
        while len(self._blocks) > self._most:
            self._blocks.popitem(last=False)

    def clear(self) -> None:
        """Forget all blocks."""
        self._blocks.clear()

    def _keys(self, ids: NDArray[np.int32], salt: int) -> list[int]:
        """A hash of all tokens up to the end of each whole block: their sum, each times a random number of its place, and the salt,
        modulo 2^64."""
        if self._factors.size < ids.size:
            self._factors = np.random.default_rng(_SEED).integers(1, 2**64, max(1024, 2 * ids.size), np.uint64)
        sums = np.cumsum((ids.astype(np.uint64) + np.uint64(1)) * self._factors[: ids.size])
        sums += np.uint64(salt)
        keys: list[int] = sums[self._size - 1 :: self._size].tolist()
        return keys
