"""Groups in files that other programs read: Parquet, and JSON lines (also gzipped). The name's ending decides.

One row a rollout; see `buffer.export_rows` for its columns. Writing and reading hold a bounded slice in memory. What is
written is read back without loss: every field equal, token arrays bit by bit.

JSON knows no NaN and no infinity. Where a log-probability is one (which only a token that is not trained on may have), its
place in the list holds null, and the column `logprobs_bits` says which bits stand there. The last row of such a file has
`end` set: a file that was cut off is told from a whole one.
"""

import gzip
import json
import os
import secrets
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from buffer.errors import FileFormatError
from buffer.export_parquet import ParquetRows, parquet_rows, pyarrow
from buffer.export_rows import COLUMNS, BadRowError, Kind, Row, array_of, check_columns, groups_of, rows_of
from buffer.rollout import RolloutGroup

_SLICE_BYTES = 2**24
"""About the most that is held before it is written: a row group of Parquet."""

_PARQUET, _JSONL, _GZIPPED = ".parquet", ".jsonl", ".jsonl.gz"


def suffix_of(path: str | os.PathLike[str]) -> str:
    """ ".parquet", ".jsonl" or ".jsonl.gz"; any other name is refused."""
    name = Path(path).name.lower()
    for suffix in (_PARQUET, _JSONL, _GZIPPED):
        if name.endswith(suffix) and name != suffix:
            return suffix
    raise ValueError(f"{str(path)!r}: the format is told by the name's ending; use .parquet, .jsonl or .jsonl.gz")


class GroupWriter:
    """A file of groups in the making, to be entered with `with`. It appears under its name when it is whole, or not at all.

    Args:
        path: the file, in a folder that exists; its ending decides the format.
        overwrite: replace a file that is there.

    Raises:
        ValueError: an unknown ending.
        FileExistsError: the file is there.
        FileNotFoundError: its folder is not.
        ImportError: Parquet without pyarrow.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        suffix = suffix_of(path)
        self._path, self._overwrite = Path(path).absolute(), overwrite
        self._refuse_place()
        if suffix == _PARQUET:
            pyarrow()
        self._partial = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}.partial")
        self._file = self._partial.open("xb")
        self._rows: ParquetRows | _JsonRows = ParquetRows(self._file) if suffix == _PARQUET else _JsonRows(self._file, suffix)
        self.groups = 0
        self._waiting: list[Row] = []
        self._bytes = 0

    def write(self, groups: Iterable[RolloutGroup]) -> None:
        """Append the groups."""
        for group in groups:
            rows = rows_of(group)
            self.groups += 1
            self._waiting += rows
            self._bytes += sum(_size(value) for row in rows for value in row.values())
            if self._bytes >= _SLICE_BYTES:
                self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._rows.write(self._waiting)
        self._waiting, self._bytes = [], 0

    def finish(self) -> None:
        """Write the rest, and give the file its name."""
        self._flush()
        self._rows.finish()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._publish()

    def _publish(self) -> None:
        if self._overwrite:
            self._partial.replace(self._path)
        else:
            try:
                # Unlike a rename, it refuses a file that came there meanwhile.
                os.link(self._partial, self._path)
                self._partial.unlink()
            except FileExistsError:
                self._refuse_place()
                raise
            except OSError:  # a file system without links
                self._refuse_place()
                self._partial.rename(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _refuse_place(self) -> None:
        if self._path.is_dir():
            raise IsADirectoryError(f"{self._path} is a folder; give the name of a file")
        if not self._path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {self._path.parent} for {self._path.name}; make it first")
        if not self._overwrite and os.path.lexists(self._path):
            raise FileExistsError(f"{self._path} is there already; give another name, or overwrite=True")

    def abandon(self) -> None:
        """Leave nothing behind; after `finish` there is nothing to do."""
        with suppress(OSError, ValueError):  # what is thrown away need not be whole
            self._rows.close()
        with suppress(OSError):
            self._file.close()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self.finish()
        finally:
            self.abandon()


def _size(value: Any) -> int:
    return int(value.nbytes) if isinstance(value, np.ndarray) else len(value) if isinstance(value, str) else 8


def write_groups(path: str | os.PathLike[str], groups: Iterable[RolloutGroup], *, overwrite: bool = False) -> int:
    """Write the groups, in their order, in the format that the name's ending tells; gives how many. See `GroupWriter`."""
    with GroupWriter(path, overwrite=overwrite) as writer:
        writer.write(groups)
    return writer.groups


def write_parquet(path: str | os.PathLike[str], groups: Iterable[RolloutGroup], *, overwrite: bool = False) -> int:
    """`write_groups` to a name that ends in .parquet."""
    if suffix_of(path) != _PARQUET:
        raise ValueError(f"{str(path)!r} does not end in .parquet")
    return write_groups(path, groups, overwrite=overwrite)


def write_jsonl(path: str | os.PathLike[str], groups: Iterable[RolloutGroup], *, overwrite: bool = False) -> int:
    """`write_groups` to a name that ends in .jsonl or .jsonl.gz."""
    if suffix_of(path) == _PARQUET:
        raise ValueError(f"{str(path)!r} ends in neither .jsonl nor .jsonl.gz")
    return write_groups(path, groups, overwrite=overwrite)


def read_groups(path: str | os.PathLike[str]) -> Generator[RolloutGroup]:
    """The groups of a file, one after the other; closing the iterator closes the file.

    Raises:
        FileFormatError: where the file is no export, damaged or cut off, naming the row (from 1).
        OSError: it cannot be opened.
        ValueError: an unknown ending.
    """
    suffix = suffix_of(path)
    with Path(path).open("rb") as file:
        rows = parquet_rows(file) if suffix == _PARQUET else _json_rows(file, suffix)
        try:
            yield from groups_of(rows)
        except BadRowError as error:
            raise FileFormatError(f"{path}, row {error.number}: {error}; restore the file, or export it again") from error


# -- JSON lines -----------------------------------------------------------------------------------------------


class _JsonRows:
    """Writes rows as lines, one late: only the last is the end."""

    def __init__(self, file: BinaryIO, suffix: str) -> None:
        self._gzip = gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0, compresslevel=6) if suffix == _GZIPPED else None
        self._file: Any = self._gzip or file
        self._last: Row | None = None

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if self._last is not None:
                self._file.write(_line(self._last, end=False))
            self._last = row

    def finish(self) -> None:
        # Of no groups: a line without a row, since a file without a byte could be the rest of any.
        self._file.write(b"\n" if self._last is None else _line(self._last, end=True))
        self.close()

    def close(self) -> None:
        if self._gzip is not None:
            self._gzip.close()


def _line(row: Row, *, end: bool) -> bytes:
    logprobs, bits = _without_nonfinite(row["logprobs"])
    lists = {name: None if row[name] is None else row[name].tolist() for name, kind in COLUMNS.items() if kind.is_array}
    columns = {name: row[name] for name in COLUMNS} | lists | {"logprobs": logprobs, "logprobs_bits": json.dumps(bits), "end": end}
    return json.dumps(columns, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _without_nonfinite(logprobs: NDArray[np.float32]) -> tuple[list[float | None], list[list[int]]]:
    places = np.flatnonzero(~np.isfinite(logprobs))
    values: list[float | None] = logprobs.tolist()  # as doubles, whose shortest text gives every float32 back
    for place in places:
        values[place] = None
    return values, [[int(place), int(logprobs.view(np.uint32)[place])] for place in places]


def _json_rows(file: BinaryIO, suffix: str) -> Iterator[tuple[int, Row]]:
    number, ended = 0, False
    lines: Any = gzip.GzipFile(fileobj=file) if suffix == _GZIPPED else file
    try:
        for number in count(1):
            line = lines.readline()
            if not line:
                break
            if ended:
                raise ValueError("it stands behind the end")
            if line == b"\n" and number == 1:
                ended = True
                continue
            row, ended = _parsed(line)
            yield number, row
    except (ValueError, LookupError, TypeError, OSError, EOFError, zlib.error, RecursionError) as error:
        raise BadRowError(number, f"it does not decode ({error})") from error
    if not ended:
        raise BadRowError(number, "the file ends before its last row; it was cut off")


def _parsed(line: bytes) -> tuple[Row, bool]:
    if not line.endswith(b"\n"):
        raise ValueError("the line is cut off")
    row = json.loads(line, parse_constant=_refuse_constant)
    if not isinstance(row, dict):
        raise ValueError("it is no JSON object")
    bits, end = row.pop("logprobs_bits", None), row.pop("end", None)
    check_columns(row)
    if not isinstance(bits, str) or not isinstance(end, bool):
        raise ValueError("logprobs_bits must be JSON as text, and end true or false; this is no export of groups")
    row["logprobs"] = _with_nonfinite(row["logprobs"], json.loads(bits))
    for name, kind in COLUMNS.items():
        if kind.is_array and row[name] is not None:
            row[name] = array_of(name, row[name]) if kind is not Kind.FLOAT32 else row[name]
    return row, end


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _with_nonfinite(values: Any, bits: Any) -> NDArray[np.float32]:
    if not isinstance(values, list):
        raise ValueError(f"logprobs is {values!r:.40}, and must be a list of numbers")
    missing = [place for place, value in enumerate(values) if value is None]
    if missing != [place for place, _ in bits]:
        raise ValueError("logprobs_bits does not say what stands where logprobs has null")
    array = array_of("logprobs", [0.0 if value is None else value for value in values])
    for place, word in bits:
        array.view(np.uint32)[place] = word
    return array
