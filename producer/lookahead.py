"""`Lookahead`: the prompts of one task that are drawn and wait to be chosen, as a sampler knows them. No tasks, no storage."""

from collections.abc import Mapping, Sequence

from buffer import Position, RolloutGroup
from producer.predict import PromptOrder, Waiting, known_lengths, remaining

_REMEMBERED = 10_000
"""Groups that were started whose predicted length is kept, for when they are continued."""


class Lookahead:
    """Keeps what waits in the order of its draw, with predictions; from that order follows how often each was overtaken."""

    def __init__(self, order: PromptOrder) -> None:
        self._order = order
        self._numbers: dict[int, int] = {}  # of those that wait, in the order of their draw
        self._last_number = 0
        self._positions: dict[int, Position] = {}
        self._predicted: dict[int, float] = {}
        self._begun: dict[int, float] = {}
        self._most_wanted = 0

    def __len__(self) -> int:
        return len(self._numbers)

    def missing(self, n: int) -> int:
        """Prompts to draw before `n` are chosen."""
        self._most_wanted = max(self._most_wanted, n)
        asked = (self._started, n, self._most_wanted)
        return 0 if len(self) >= max(n, self._order.least(*asked)) else max(n, self._order.ahead(*asked)) - len(self)

    @property
    def _started(self) -> int:
        return self._last_number - len(self)

    def update(self, positions: Mapping[int, Position | None]) -> None:
        """These wait now, in this order; of those known already what is known stays."""
        known, self._numbers = self._numbers, {}
        for group_id in positions:
            if group_id not in known:
                self._last_number += 1
            self._numbers[group_id] = known.get(group_id, self._last_number)
        self._positions = {group_id: position for group_id, position in positions.items() if position is not None}
        self._predicted = {group_id: length for group_id, length in self._predicted.items() if group_id in positions}

    def unpredicted(self) -> dict[int, Position]:
        """The groups whose lengths are unknown, and where their prompts stand."""
        return {group_id: at for group_id, at in self._positions.items() if group_id not in self._predicted}

    def predict(self, lengths: Mapping[int, float]) -> None:
        """Note predicted lengths of groups that wait."""
        self._predicted.update(lengths)

    def choose(self, n: int) -> list[int]:
        """The groups to start, in order."""
        # Those drawn after it that wait no more went ahead of it.
        ahead = self._started + 1
        predicted = self._predicted.get
        waiting = [
            Waiting(group_id, predicted(group_id), ahead + at - number, number - 1)
            for at, (group_id, number) in enumerate(self._numbers.items())
        ]
        return self._order.choose(waiting, n)

    def gone(self, chosen: Sequence[int]) -> None:
        """These were chosen, and wait no more: they were started, or another process has them."""
        for group_id in chosen:
            self._numbers.pop(group_id, None)
            self._positions.pop(group_id, None)
            if (length := self._predicted.pop(group_id, None)) is not None:
                self._begun[group_id] = length
        while len(self._begun) > _REMEMBERED:
            del self._begun[next(iter(self._begun))]

    def longest_remaining_first(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        """Groups to be continued, those first that have most to decode; as they come where no length was predicted here."""
        lengths = known_lengths([self._begun.get(group.group_id) for group in groups])
        if lengths is None:
            return list(groups)
        left = {group.group_id: remaining(length, group) for length, group in zip(lengths, groups, strict=True)}
        return sorted(groups, key=lambda group: -left[group.group_id])
