"""Reading rows from what users hold their prompts in, one after the other, from any point on.

A source is opened at a cursor (JSON-able, as a database kept it) and then gives rows with the cursor behind each.
"""

import base64
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

# Here, not when it is first needed: a dataloader's worker, forked while another thread imports it, would wait for it for ever.
from numpy.random import default_rng
from numpy.typing import NDArray

from agent_loop.arguments import at_least, flag
from buffer.rollout import Position
from producer.errors import DatasetError

T = TypeVar("T")

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
        """The next row; `DatasetError` if there is none, or it cannot be read: it is then tried again, never passed over."""

    def earlier(self, position: Position, epochs: int) -> list[Position]:
        """Where the row of this position stood in up to so many epochs before, the newest first; none where that is unknown."""
        return []


def row_source(dataset: Any, *, shuffle: bool, seed: int) -> RowSource:
    """The source that fits `dataset`; nothing is read from it here."""
    if hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict") and hasattr(dataset, "__iter__"):
        return LoaderSource(dataset)
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        return MapSource(dataset, shuffle=shuffle, seed=seed)
    remedy = "pass a list, a map-style dataset, or a torchdata StatefulDataLoader"
    if hasattr(dataset, "batch_size") and hasattr(dataset, "dataset"):  # a plain torch DataLoader, without importing torch
        remedy = "use torchdata's StatefulDataLoader, which takes the same arguments, or pass the map-style dataset itself"
    raise DatasetError(
        f"a {type(dataset).__name__} cannot be resumed: it has neither __getitem__ and __len__ nor state_dict and load_state_dict; {remedy}"
    )


_EPOCHS_REMEMBERED = 6


class MapSource(RowSource):
    """A list or map-style dataset; resumes by (epoch, offset), each epoch with a shuffle of its own."""

    def __init__(self, dataset: Any, *, shuffle: bool, seed: int) -> None:
        at_least("seed", seed, 0)
        flag("shuffle", shuffle)
        self._dataset, self._shuffle, self._seed = dataset, shuffle, seed
        self._at = Position(0, 0)
        self._size = 0
        self._order: NDArray[np.int64] = np.arange(0)
        self._orders: dict[int, NDArray[np.int64]] = {}
        self._places: dict[int, NDArray[np.int64]] = {}

    def open(self, cursor: Cursor | None) -> None:
        self._size = len(self._dataset)
        self._orders.clear()
        self._places.clear()
        if self._size == 0:
            raise DatasetError("the dataset is empty; give one with at least one row")
        if cursor is not None:
            self._refuse_change(cursor)
        self._go_to(Position(0, 0) if cursor is None else Position(cursor["epoch"], cursor["offset"]))

    def read(self) -> SourceRow:
        if self._at.offset == self._size:
            self._go_to(Position(self._at.epoch + 1, 0))
        at, index = self._at, int(self._order[self._at.offset])
        name = f"row {index} (epoch {at.epoch}, offset {at.offset})"
        row = _readable(name, lambda: self._dataset[index])
        self._at = at._replace(offset=at.offset + 1)  # only now: a row that could not be read is read again
        return SourceRow(row, at, name, {"epoch": at.epoch, "offset": at.offset + 1, **self._identity()})

    def earlier(self, position: Position, epochs: int) -> list[Position]:
        if position.offset >= self._size:
            return []
        index = self._order_of(position.epoch)[position.offset]
        before = range(position.epoch - 1, max(-1, position.epoch - 1 - epochs), -1)
        return [Position(epoch, int(self._place_in(epoch)[index])) for epoch in before]

    def _go_to(self, position: Position) -> None:
        self._at, self._order = position, self._order_of(position.epoch)

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        """Which row stands at each offset."""
        return self._remembered(self._orders, epoch, self._shuffled)

    def _place_in(self, epoch: int) -> NDArray[np.int64]:
        """At which offset each row stands."""
        return self._remembered(self._places, epoch, lambda of: np.argsort(self._order_of(of)))

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        generator = default_rng([self._seed, epoch])
        order: NDArray[np.int64] = generator.permutation(self._size) if self._shuffle else np.arange(self._size)
        return order

    def _remembered(self, known: dict[int, NDArray[np.int64]], epoch: int, make: Callable[[int], NDArray[np.int64]]) -> NDArray[np.int64]:
        """Made once for the few epochs that are looked at together: they may be long."""
        if epoch not in known:
            known[epoch] = make(epoch)
            if len(known) > _EPOCHS_REMEMBERED:
                del known[next(iter(known))]
        return known[epoch]

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
    yet: the cursor is the loader's state before the batch in hand, and how many of its rows were delivered. It also
    holds where the random generators stood when the epoch began: most samplers have no state of their own, and
    those that do leave a shared generator elsewhere after a restart, so that the next epoch would come in another order.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._generators = _generators(loader)
        self._batches: Iterator[Any] | None = None
        self._rows: deque[Any] = deque()
        self._cursor: Cursor | None = None
        self._start: Cursor | None = None

    def open(self, cursor: Cursor | None) -> None:
        if cursor is not None and "loader" not in cursor:
            raise DatasetError("the run was begun with a map-style dataset, not a dataloader; pass it again, or another task_name")
        if self._start is None:
            self._start = self._epoch_start(0)
        cursor = cursor or self._start
        self._batches, self._cursor = None, cursor
        self._reopen()

    def read(self) -> SourceRow:
        if self._batches is None:
            self._reopen()
        while not self._rows:
            self._next_batch()
        cursor, row = self._opened(), self._rows.popleft()
        position = Position(cursor["epoch"], cursor["offset"])
        behind = {**cursor, "offset": position.offset + 1, "taken": cursor["taken"] + 1}
        if not self._rows:
            behind |= {"loader": _to_json(self._loader.state_dict()), "taken": 0}
        self._cursor = behind
        return SourceRow(row, position, f"the row at epoch {position.epoch}, offset {position.offset}", behind)

    def _opened(self) -> Cursor:
        assert self._cursor is not None, "read before open"
        return self._cursor

    def _epoch_start(self, epoch: int) -> Cursor:
        generators = _to_json([generator.get_state() for generator in self._generators])
        return {"epoch": epoch, "offset": 0, "generators": generators, "loader": _to_json(self._loader.state_dict()), "taken": 0}

    def _reopen(self) -> None:
        """Go to the cursor; in one process too, so that whatever comes is a function of the cursor alone."""
        cursor = self._opened()
        self._rows.clear()
        batches = _readable("the dataloader's stored state", lambda: self._iterate(cursor))
        if cursor["taken"]:
            self._rows.extend(_rows_of(self._loader, _readable("the batch in hand", lambda: next(batches, ()))))
            if len(self._rows) <= cursor["taken"]:
                raise DatasetError(
                    "the dataloader gives fewer rows than it did; pass the same dataset and batch_size, or another task_name"
                )
            for _ in range(cursor["taken"]):
                self._rows.popleft()
        self._batches = batches

    def _iterate(self, cursor: Cursor) -> Iterator[Any]:
        for generator, state in zip(self._generators, _from_json(cursor["generators"]), strict=True):
            generator.set_state(state)
        self._loader.load_state_dict(_from_json(cursor["loader"]))
        return iter(self._loader)

    def _next_batch(self) -> None:
        assert self._batches is not None
        batches, cursor = self._batches, self._opened()
        # Until it is read: a loader that raised has passed over the batch, and must be set back to the cursor.
        self._batches = None
        name = f"the batch at epoch {cursor['epoch']}, offset {cursor['offset']}"
        batch = _readable(name, lambda: next(batches, _END))
        if batch is _END:
            self._next_epoch(cursor)
        else:
            self._rows.extend(_rows_of(self._loader, batch))
            self._batches = batches

    def _next_epoch(self, cursor: Cursor) -> None:
        if cursor["offset"] == 0:
            raise DatasetError("the dataloader gave no row in a whole epoch; give one with at least one row")
        for _ in self._iterate(cursor):  # back to the end of the epoch, from where the generators go on
            raise DatasetError("the dataloader gives rows behind the end of its epoch; its state_dict must say that it is at the end")
        iter(self._loader)  # its state is that of the next epoch now
        self._cursor = self._epoch_start(cursor["epoch"] + 1)
        self._reopen()


_END = object()


def _readable(what: str, read: Callable[[], T]) -> T:
    """What `read` gives; its error, which may be any, as one that says what was being read."""
    try:
        return read()
    except Exception as error:
        raise DatasetError(f"{what} cannot be read: {type(error).__name__}: {error}") from error


def _generators(loader: Any) -> list[Any]:
    """The random generators that the loader's order may come from; a random sampler without one is refused."""
    sampler = getattr(loader, "sampler", None)
    samplers: list[Any] = [sampler, getattr(getattr(loader, "batch_sampler", None), "sampler", None)]
    for each in samplers:
        if each is not None and getattr(each, "generator", each) is None:
            raise DatasetError(
                f"the dataloader's {type(each).__name__} has no generator, so that its order cannot be resumed; give it generator=, "
                "or give the dataloader shuffle=True and no sampler"
            )
    found = [getattr(owner, "generator", None) for owner in (loader, *samplers)]
    return list({id(generator): generator for generator in found if hasattr(generator, "set_state")}.values())


def _rows_of(loader: Any, batch: Any) -> Sequence[Any]:
    if isinstance(batch, list | tuple):
        return batch
    if isinstance(batch, Mapping) and (getattr(loader, "batch_size", None) or 1) > 1:
        raise DatasetError("the dataloader puts its rows together into one mapping of columns; pass it collate_fn=list, to keep them rows")
    return [batch]


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
