"""How to sample: `SamplingParams`, the same for every engine."""

import dataclasses
import math
import operator
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, SupportsFloat, SupportsIndex


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next tokens are drawn; names and meanings are vLLM's.

    Attributes:
        max_tokens: the most tokens of one response, continuations included; the engine is given what is left.
        temperature: 0 is greedy.
        top_p: nucleus sampling; 1 is off.
        top_k: 0 is off.
        min_p: 0 is off.
        repetition_penalty: 1 is off.
        stop: strings that end the response (found in the decoded text).
        stop_token_ids: tokens that end the response, beside the model's EOS; the ending token is kept.
        ignore_eos: go on after EOS until `max_tokens`.
        seed: of this request, from 0 to 2**63 - 1; None draws from the engine's own generator.
        top_logprobs: how many of the likeliest tokens the completion also tells at each position; 0 is none.
        structured_outputs: what the response must be, as a mapping with one of `json` (a schema), `regex`, `choice` (a list of
            strings), `grammar` (EBNF), `json_object` (True) and `structural_tag`; vLLM's further options may stand beside it.

    `logprobs` that engines return are always those of the sampling distribution (after temperature, truncation and structure).
    Engines say in `capabilities` whether they have the last two, and refuse requests for what they have not.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    top_logprobs: int = 0
    structured_outputs: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k", "top_logprobs"):
            self._set(name, whole(name, getattr(self, name)))
        if self.seed is not None:
            self._set("seed", seed_number("seed", self.seed))
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            self._set(name, number(name, getattr(self, name)))
        self._set("stop", _tuple("stop", self.stop, str, "strings"))
        self._set("stop_token_ids", _tuple("stop_token_ids", self.stop_token_ids, SupportsIndex, "token ids"))
        self._set("stop_token_ids", tuple(whole("a token of stop_token_ids", token) for token in self.stop_token_ids))
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "1 or more")
        _require(self.temperature >= 0.0, "temperature", self.temperature, "0 (greedy) or more")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "above 0 and at most 1 (off)")
        _require(0 <= self.top_k < 2**31, "top_k", self.top_k, "0 (off) or more, and below 2**31")
        _require(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "from 0 (off) to 1")
        _require(self.repetition_penalty > 0.0, "repetition_penalty", self.repetition_penalty, "above 0; 1 is off")
        _require(all(self.stop), "stop", self.stop, "non-empty strings")
        _require(
            all(0 <= token < 2**31 for token in self.stop_token_ids), "stop_token_ids", self.stop_token_ids, "ids of tokens, 0 or more"
        )
        _require(isinstance(self.ignore_eos, bool), "ignore_eos", self.ignore_eos, "True or False")
        _require(self.top_logprobs >= 0, "top_logprobs", self.top_logprobs, "0 (none) or more")
        if self.structured_outputs is not None:
            _check_structure(self.structured_outputs)
            _require(not self.ignore_eos, "ignore_eos", True, "False with structured_outputs: what follows the structure's end has none")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def replace(self, **changes: Any) -> "SamplingParams":
        """A copy with `changes`, checked again."""
        return dataclasses.replace(self, **changes)

    def of_request(self, max_tokens: int, seed: int | None) -> "SamplingParams":
        """A copy for one request, with values that its caller answers for: nothing is checked again, it is made for each."""
        if max_tokens == self.max_tokens and seed == self.seed:
            return self
        copy: SamplingParams = object.__new__(SamplingParams)
        for name in _NAMES:
            object.__setattr__(copy, name, getattr(self, name))
        object.__setattr__(copy, "max_tokens", max_tokens)
        object.__setattr__(copy, "seed", seed)
        return copy

    def overridden(self, overrides: Mapping[str, Any]) -> "SamplingParams":
        """A copy with a prompt's own overrides; an unknown name is refused with the names that exist."""
        if type(overrides) is dict and not overrides:  # nearly always, and a protocol's isinstance takes microseconds
            return self
        if not isinstance(overrides, Mapping):
            raise ValueError(f"sampling parameters {overrides!r:.60} are no mapping; give one such as {{'max_tokens': 256}}")
        if unknown := set(overrides).difference(_NAMES):
            raise ValueError(f"unknown sampling parameters {sorted(map(str, unknown))}; known are {sorted(_NAMES)}")
        return self.replace(**overrides)


LARGEST_VERSION = 2**31 - 1
"""Of weights and adapters: tokens carry their versions as int32."""

LARGEST_SEED = 2**63 - 1
"""Of requests: what torch's generators, and messages to engine processes, hold."""

_NAMES = tuple(one.name for one in dataclasses.fields(SamplingParams))

STRUCTURES = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
"""What `SamplingParams.structured_outputs` may ask for; one at a time."""

_STRUCTURE_OPTIONS = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")


def _check_structure(given: object) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"structured_outputs={given!r:.60} must be a mapping with one of {STRUCTURES}")
    if unknown := sorted(map(str, set(given) - {*STRUCTURES, *_STRUCTURE_OPTIONS})):
        raise ValueError(f"structured_outputs has unknown keys {unknown}; known are {STRUCTURES}, and beside them {_STRUCTURE_OPTIONS}")
    asked = [name for name in STRUCTURES if given.get(name) is not None]
    if len(asked) != 1:
        raise ValueError(f"structured_outputs asks for {asked or 'nothing'}; it must hold one of {STRUCTURES}")
    if asked == ["choice"]:
        choices = _tuple("structured_outputs['choice']", given["choice"], str, "strings")
        _require(bool(choices) and all(choices), "structured_outputs['choice']", choices, "one non-empty string or more")


def whole(name: str, value: object) -> int:
    """`value` as an int, or `ValueError`: 2.5 tokens, "8" and True are slips, not numbers of tokens."""
    if type(value) is int:  # by far the most common, and a protocol's isinstance takes microseconds
        return value
    if isinstance(value, SupportsIndex) and not isinstance(value, bool):
        with suppress(TypeError):  # an array has the method, and a class has it too
            return operator.index(value)
    raise ValueError(f"{name}={value!r:.200} must be a whole number")


def seed_number(name: str, value: object, largest: int = LARGEST_SEED) -> int:
    """A seed, or `ValueError`: below 0 some engines take it for none, and beyond their bound they fail in their midst."""
    seed = whole(name, value)
    if not 0 <= seed <= largest:
        raise ValueError(f"{name}={seed!s:.40} is out of bounds; it must be from 0 to {largest}, or None for one that is drawn")
    return seed


def version_number(value: object) -> int:
    """A version of weights, or `ValueError`: tokens carry it as an int32, and versions never go back to one that fits."""
    version = whole("version", value)
    if version > LARGEST_VERSION:
        raise ValueError(f"version={version} is above {LARGEST_VERSION}, the largest that tokens can carry; count updates, from 1")
    return version


def number(name: str, value: object) -> float:
    """`value` as a finite float, or `ValueError`."""
    if type(value) is float and math.isfinite(value):
        return value
    if isinstance(value, SupportsFloat) and not isinstance(value, bool):
        with suppress(TypeError, OverflowError):  # an array has the method, and a class has it too; 10**400 is above any float
            if math.isfinite(converted := float(value)):
                return converted
    raise ValueError(f"{name}={value!r:.200} must be a finite number")


def _tuple(name: str, values: object, kind: Any, what: str) -> tuple[Any, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name}={values!r:.80} must be a tuple of {what}")
    listed = tuple(values)
    if not listed:
        return listed
    _require(all(isinstance(value, kind) and not isinstance(value, bool) for value in listed), name, values, f"a tuple of {what}")
    return listed


def _require(holds: bool, name: str, value: object, bound: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r:.80} is out of bounds; it must be {bound}")
