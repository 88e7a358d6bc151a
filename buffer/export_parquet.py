"""Rows of groups as Parquet, through pyarrow (the extra `parquet`); nothing else imports it, and only functions here do."""

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

from buffer.export_rows import COLUMNS, BadRowError, Kind, Row, check_columns

_BATCH_ROWS = 64
"""Rows that a reader decodes at once."""


def pyarrow() -> tuple[ModuleType, ModuleType]:
    """pyarrow and its Parquet module; `ImportError` says how they are installed."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow: pip install 'millrace[parquet]', or use a file that ends in .jsonl.gz") from error
    return pa, pq


def _schema(pa: ModuleType) -> Any:
    types = {
        Kind.WHOLE: pa.int64(),
        Kind.NUMBER: pa.float64(),
        Kind.TEXT: pa.string(),
        Kind.JSON: pa.string(),
        Kind.INT32: pa.list_(pa.int32()),
        Kind.FLOAT32: pa.list_(pa.float32()),
        Kind.UINT8: pa.list_(pa.uint8()),
    }
    return pa.schema([(name, types[kind]) for name, kind in COLUMNS.items()])


class ParquetRows:
    """Writes slices of rows, each as a row group."""

    def __init__(self, file: BinaryIO) -> None:
        self._pa, pq = pyarrow()
        self._schema = _schema(self._pa)
        # Floats without a dictionary: it would make one of all NaN, and of both zeros.
        with_dictionary = [f"{name}.list.element" if kind.is_array else name for name, kind in COLUMNS.items() if "float" not in kind.value]
        self._writer = pq.ParquetWriter(
            file, self._schema, compression="zstd", use_dictionary=with_dictionary, write_page_checksum=True, store_schema=False
        )

    def write(self, rows: Sequence[Row]) -> None:
        """Append the rows as one row group."""
        columns = [self._column(name, [row[name] for row in rows]) for name in COLUMNS]
        self._writer.write_batch(self._pa.record_batch(columns, schema=self._schema), row_group_size=len(rows))

    def _column(self, name: str, values: Sequence[Any]) -> Any:
        pa, type_ = self._pa, self._schema.field(name).type
        if not COLUMNS[name].is_array:
            return pa.array(values, type=type_)
        empty = np.empty(0, COLUMNS[name].value)
        arrays = [empty if value is None else value for value in values]
        offsets = np.cumsum([0, *(array.size for array in arrays)]).astype(np.int32)
        missing = pa.array([value is None for value in values])
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)), type=type_, mask=missing)

    def finish(self) -> None:
        """Write the footer, without which the file is none."""
        self._writer.close()

    def close(self) -> None:
        """Let go of the writer, whole or not: it would else close itself when it is collected, into a file that is closed."""
        try:
            self._writer.close()
        finally:
            self._writer.is_open = False


def parquet_rows(file: BinaryIO) -> Iterator[tuple[int, Row]]:
    """The rows of a file, numbered from 1, a bounded number decoded at once; `BadRowError` where it is none of ours."""
    pa, pq = pyarrow()
    number = 0
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            _check_schema(pa, parquet.schema_arrow)
            for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, use_threads=False):
                columns = {name: _values(batch.column(name), kind) for name, kind in COLUMNS.items()}
                for at in range(batch.num_rows):
                    number += 1
                    yield number, {name: values[at] for name, values in columns.items()}
    except BadRowError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise BadRowError(number + 1, f"it does not decode ({error})") from error


def _check_schema(pa: ModuleType, schema: Any) -> None:
    """Only the plain types of an export: no extension types, whose meaning is whatever is registered for them."""
    check_columns(schema.names)
    if len(schema.names) != len(COLUMNS):
        raise ValueError("a column is there twice")
    for name, kind in COLUMNS.items():
        found = schema.field(name).type
        if not _is_of(pa, found, kind):
            raise ValueError(f"column {name!r} is of type {found}, and must be {'a list of ' if kind.is_array else ''}{kind.value}")


def _is_of(pa: ModuleType, found: Any, kind: Kind) -> bool:
    if isinstance(found, pa.BaseExtensionType):
        return False
    if kind.is_array:
        is_list = pa.types.is_list(found) or pa.types.is_large_list(found)
        return bool(is_list and found.value_type == getattr(pa, kind.value)())
    if kind in (Kind.TEXT, Kind.JSON):
        # Of null: another program wrote a column that is empty.
        return bool(pa.types.is_string(found) or pa.types.is_large_string(found) or pa.types.is_null(found))
    return bool(found == getattr(pa, kind.value)() or pa.types.is_null(found))


def _values(column: Any, kind: Kind) -> Sequence[Any]:
    if not kind.is_array:
        return list(column.to_pylist())
    if column.values.null_count:
        raise ValueError("a list holds nulls")
    numbers, offsets = column.values.to_numpy(), column.offsets.to_numpy()
    present = column.is_valid().to_pylist()
    return [numbers[start:end] if there else None for start, end, there in zip(offsets[:-1], offsets[1:], present, strict=True)]
