"""`Lookahead`: the prompts of one task that are drawn and wait to be chosen, as a sampler knows them. No tasks, no storage."""

from collections.abc import Mapping, Sequence

from buffer import Position, RolloutGroup
from producer.predict import PromptOrder, Waiting, known_lengths, remaining

_REMEMBERED = 10_000
"""Groups that were started whose predicted length is kept, for when they are continued."""


class Lookahead:
    """Keeps what waits in the order of its draw, with predictions and how often each was overtaken."""

    def __init__(self, order: PromptOrder) -> None:
        self._order = order
        self._waiting: dict[int, Waiting] = {}
        self._positions: dict[int, Position] = {}
        self._most_wanted = 0
        self._begun: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def size(self) -> int:
        """Prompts that are to wait."""
        return self._order.window * self._most_wanted

    def is_low(self, n: int) -> bool:
        """Whether prompts should be drawn before `n` are chosen: not for each, but for as many as are wanted at once."""
        self._most_wanted = max(self._most_wanted, n)
        return len(self) < max(n, self.size - self._most_wanted + 1)

    def update(self, positions: Mapping[int, Position | None]) -> None:
        """These wait now, in this order; of those known already what is known stays."""
        self._waiting = {group_id: self._waiting.get(group_id, Waiting(group_id, None)) for group_id in positions}
        self._positions = {group_id: position for group_id, position in positions.items() if position is not None}

    def unpredicted(self) -> dict[int, Position]:
        """The groups whose lengths are unknown, and where their prompts stand."""
        return {group_id: at for group_id, at in self._positions.items() if self._waiting[group_id].predicted is None}

    def predict(self, lengths: Mapping[int, float]) -> None:
        """Note predicted lengths of groups."""
        for group_id, length in lengths.items():
            self._waiting[group_id] = self._waiting[group_id]._replace(predicted=length)

    def choose(self, n: int) -> list[int]:
        """The groups to start, in order."""
        return self._order.choose(list(self._waiting.values()), n)

    def gone(self, chosen: Sequence[int], started: Sequence[int]) -> None:
        """These were chosen, and wait no more; only those `started` went ahead of others."""
        left, behind = dict[int, Waiting](), len(started)
        before = set(started)
        for group_id, waiting in self._waiting.items():
            if group_id in before:
                behind -= 1  # those started that were drawn after what comes now
            left[group_id] = waiting._replace(overtaken=waiting.overtaken + behind)
        for group_id in chosen:
            length = left.pop(group_id, Waiting(group_id, None)).predicted
            self._positions.pop(group_id, None)
            if length is not None:
                self._begun[group_id] = length
        self._waiting = left
        while len(self._begun) > _REMEMBERED:
            del self._begun[next(iter(self._begun))]

    def longest_remaining_first(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        """Groups to be continued, those first that have most to decode; as they come where no length was predicted here."""
        lengths = known_lengths([self._begun.get(group.group_id) for group in groups])
        if lengths is None:
            return list(groups)
        left = {group.group_id: remaining(length, group) for length, group in zip(lengths, groups, strict=True)}
        return sorted(groups, key=lambda group: -left[group.group_id])
