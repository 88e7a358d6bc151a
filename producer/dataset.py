"""Reading rows from what users hold their prompts in, one after the other, from any point on.

A source is opened at a cursor (JSON-able, as a database kept it) and then gives rows with the cursor behind each.
"""

import base64
import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from buffer.rollout import Position
from producer.errors import DatasetError

Cursor = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A row, where it stands in the stream, what to call it in an error, and the cursor behind it."""

    row: Any
    position: Position
    name: str
    cursor: Cursor


class RowSource(ABC):
    """An endless stream of rows: at the end of the dataset the next epoch begins."""

    @abstractmethod
    def open(self, cursor: Cursor | None) -> None:
        """Go to the cursor, or to the start; the first moment at which the dataset may be touched."""

    @abstractmethod
    def read(self) -> SourceRow:
        """The next row; `DatasetError` if the dataset is empty."""


def row_source(dataset: Any, *, shuffle: bool, seed: int) -> RowSource:
    """The source that fits `dataset`; nothing is read from it here."""
    if hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict") and hasattr(dataset, "__iter__"):
        return LoaderSource(dataset)
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        return MapSource(dataset, shuffle=shuffle, seed=seed)
    raise DatasetError(
        f"a {type(dataset).__name__} cannot be resumed: it has neither __getitem__ and __len__ nor state_dict and load_state_dict; "
        "pass a list, a map-style dataset, or a torchdata StatefulDataLoader"
    )


class MapSource(RowSource):
    """A list or map-style dataset; resumes by (epoch, offset), each epoch with a shuffle of its own."""

    def __init__(self, dataset: Any, *, shuffle: bool, seed: int) -> None:
        self._dataset, self._shuffle, self._seed = dataset, shuffle, seed
        self._order: Iterator[tuple[Position, int]] = iter(())
        self._size = 0

    def open(self, cursor: Cursor | None) -> None:
        self._size = len(self._dataset)
        if self._size == 0:
            raise DatasetError("the dataset is empty; give one with at least one row")
        if cursor is not None:
            self._refuse_change(cursor)
        start = Position(0, 0) if cursor is None else Position(cursor["epoch"], cursor["offset"])
        self._order = self._indices(start)

    def read(self) -> SourceRow:
        position, index = next(self._order)
        name = f"row {index} (epoch {position.epoch}, offset {position.offset})"
        cursor = {"epoch": position.epoch, "offset": position.offset + 1, **self._identity()}
        return SourceRow(self._dataset[index], position, name, cursor)

    def _indices(self, start: Position) -> Iterator[tuple[Position, int]]:
        for epoch in itertools.count(start.epoch):
            order = np.random.default_rng([self._seed, epoch]).permutation(self._size) if self._shuffle else np.arange(self._size)
            first = start.offset if epoch == start.epoch else 0
            for offset in range(first, self._size):
                yield Position(epoch, offset), int(order[offset])

    def _identity(self) -> dict[str, Any]:
        return {"size": self._size, "seed": self._seed, "shuffle": self._shuffle}

    def _refuse_change(self, cursor: Cursor) -> None:
        began = {name: cursor.get(name) for name in self._identity()}
        if began != self._identity():
            raise DatasetError(
                f"the run was begun with a dataset of {began}, this one has {self._identity()}; going on would skip and repeat prompts: "
                "pass the same dataset, seed and shuffle, or another task_name"
            )


class LoaderSource(RowSource):
    """A dataloader with `state_dict` and `load_state_dict` (torchdata's StatefulDataLoader); resumes by its state.

    A batch is a list of rows, or one row (a mapping). Rows that the loader's workers prefetched are not delivered
    yet: the cursor is the loader's state before the batch in hand, and how many of its rows were delivered.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._batches: Iterator[Any] | None = None
        self._rows: deque[Any] = deque()
        self._state: Any = None
        self._taken = 0
        self._epoch = self._offset = 0

    def open(self, cursor: Cursor | None) -> None:
        self._rows.clear()
        if cursor is None:
            self._state, self._taken, self._epoch, self._offset = None, 0, 0, 0
            self._batches = iter(self._loader)
            return
        self._epoch, self._offset = cursor["epoch"], cursor["offset"]
        self._state = cursor["loader"]
        if self._state is not None:
            self._loader.load_state_dict(_from_json(self._state))
        self._batches = iter(self._loader)
        skip = cursor["taken"]
        if skip:
            self._next_batch()
            for _ in range(skip):
                self._rows.popleft()
        self._taken = skip

    def read(self) -> SourceRow:
        while not self._rows:
            self._next_batch()
        row, position = self._rows.popleft(), Position(self._epoch, self._offset)
        self._taken, self._offset = self._taken + 1, self._offset + 1
        if not self._rows:
            self._state, self._taken = _to_json(self._loader.state_dict()), 0
        cursor = {"epoch": self._epoch, "offset": self._offset, "loader": self._state, "taken": self._taken}
        return SourceRow(row, position, f"the row at epoch {position.epoch}, offset {position.offset}", cursor)

    def _next_batch(self) -> None:
        assert self._batches is not None
        batch = next(self._batches, None)
        if batch is None:
            if self._offset == 0:
                raise DatasetError("the dataloader gave no row in a whole epoch; give one with at least one row")
            self._epoch, self._offset = self._epoch + 1, 0
            self._batches = iter(self._loader)
            return
        self._rows.extend(batch if isinstance(batch, list | tuple) else [batch])


def _to_json(state: Any) -> Any:
    """A loader's state as JSON: tensors, arrays, bytes and tuples are tagged; anything else is refused."""
    if isinstance(state, Mapping):
        return {"dict": [[_to_json(key), _to_json(value)] for key, value in state.items()]}
    if isinstance(state, tuple | list):
        return {type(state).__name__: [_to_json(value) for value in state]}
    if isinstance(state, bytes):
        return {"bytes": base64.b64encode(state).decode()}
    if hasattr(state, "numpy") and hasattr(state, "dtype"):
        return {"tensor": _array_to_json(state.numpy())}
    if isinstance(state, np.ndarray):
        return {"array": _array_to_json(state)}
    if isinstance(state, np.generic):
        return state.item()
    if state is None or isinstance(state, bool | int | float | str):
        return state
    raise DatasetError(
        f"the dataloader's state holds a {type(state).__name__}, which cannot be stored; keep its state to numbers, text, tensors"
    )


def _array_to_json(array: Any) -> dict[str, Any]:
    return {"dtype": str(array.dtype), "shape": list(array.shape), "data": base64.b64encode(array.tobytes()).decode()}


def _from_json(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "dict":
            return {_from_json(key): _from_json(item) for key, item in content}
        case "list":
            return [_from_json(item) for item in content]
        case "tuple":
            return tuple(_from_json(item) for item in content)
        case "bytes":
            return base64.b64decode(content)
        case "array" | "tensor":
            array = np.frombuffer(base64.b64decode(content["data"]), content["dtype"]).reshape(content["shape"]).copy()
            return _tensor(array) if kind == "tensor" else array
        case _:
            raise DatasetError(f"the stored state of the dataloader holds an unknown kind {kind!r}; was the database edited?")


def _tensor(array: Any) -> Any:
    import torch  # only a loader whose state held a tensor comes here, so torch is there

    return torch.from_numpy(array)
