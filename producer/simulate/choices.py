"""Strategies by name, with options as text: what a command line says becomes the object that production would use."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from buffer import ReplayBuffer
from producer.asynchronous import AsyncProduceStrategy
from producer.predict import LongestPredictedFirst, PromptOrder, SimilarPredictedTogether, SortedWindows
from producer.prompts import PromptSampler, ReplayPromptSampler
from producer.strategy import ProduceStrategy
from producer.sync import SyncProduceStrategy

Value = bool | int | float | str | None

STRATEGIES: Mapping[str, type[ProduceStrategy]] = {"sync": SyncProduceStrategy, "async": AsyncProduceStrategy}
ORDERS: Mapping[str, Callable[..., PromptOrder]] = {
    "windows": SortedWindows,
    "similar": SimilarPredictedTogether,
    "longest": LongestPredictedFirst,
}

_NOT_SIMULATED: Mapping[str, Any] = {"progress": False, "checkpoint_tokens": None, "checkpoint_seconds": None, "watchdog": None}
"""What a simulation has no use for: nothing is lost with its process, and nothing hangs in it."""

_UNFIT = {"buffer", "group_filter", "redundant", "policy", "on_stall", "options", "self", *_NOT_SIMULATED}
"""Those, and objects that text cannot name."""


def options_of(strategy: str) -> list[str]:
    """The options that a strategy of this name may be given, with `order` and `order_size` of the sampler."""
    inits = [vars(of)["__init__"] for of in STRATEGIES[strategy].__mro__ if "__init__" in vars(of) and of is not object]
    found = {name for init in inits for name in inspect.signature(init).parameters}
    return sorted((found - _UNFIT - {"args", "kwargs"}) | {"order", "order_size"})


def parse_value(text: str) -> Value:
    """`true`, `none`, `2`, `0.5`, or text as it stands."""
    if (named := {"true": True, "false": False, "none": None}.get(text.lower(), text)) is not text:
        return named
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_option(text: str) -> tuple[str, list[Value]]:
    """`name=1,2,none` as its name and its values."""
    name, equals, values = text.partition("=")
    if not equals or not name or not values:
        raise ValueError(f"{text!r} is no option; write NAME=VALUE, or NAME=VALUE,VALUE to try several")
    return name.strip().replace("-", "_"), [parse_value(value.strip()) for value in values.split(",")]


@dataclass(frozen=True)
class Choice:
    """A strategy and its options, by name.

    Raises:
        ValueError: no strategy or order has this name, or the strategy takes no such option.
    """

    strategy: str
    options: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy {self.strategy!r} is unknown; choose among {sorted(STRATEGIES)}")
        for name in self.options:
            if name not in (known := options_of(self.strategy)):
                raise ValueError(f"strategy {self.strategy!r} takes no option {name!r}; it takes {', '.join(known)}")
        if (order := self.options.get("order")) is not None and order not in ORDERS:
            raise ValueError(f"order={order!r} is unknown; choose among {sorted(ORDERS)} and none")
        if "order_size" in self.options and "order" not in self.options:
            raise ValueError("order_size is the size of an order's window; give order too")

    def __str__(self) -> str:
        return " ".join([self.strategy, *(f"{name}={value}".lower() for name, value in self.options.items())])

    def strategy_of(self, buffer: ReplayBuffer) -> ProduceStrategy:
        """The strategy for a buffer; it checks its options."""
        options: dict[str, Any] = {name: value for name, value in self.options.items() if name not in ("order", "order_size")}
        return STRATEGIES[self.strategy](buffer, **options, **_NOT_SIMULATED)

    def sampler_of(self, rows: list[dict[str, list[int]]], buffer: ReplayBuffer, group_size: int) -> PromptSampler:
        """Who draws the prompts, in the order that was chosen."""
        return ReplayPromptSampler(rows, buffer, group_size, shuffle=False, order=self._order())

    def _order(self) -> PromptOrder | None:
        if (order := self.options.get("order")) is None:
            return None
        size = self.options.get("order_size")
        return ORDERS[str(order)]() if size is None else ORDERS[str(order)](size)
