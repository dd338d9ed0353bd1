"""Columns of texts and numbers as Arrow has them: ten million ids take 0.3 GB, as objects 0.7.

They are made from buffers and read from them: `pa.array` and `to_numpy` import pandas (0.4 s).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, overload

import numpy as np

from pocl_dist.files import atomic_write

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_DTYPES = {"double": np.float64, "int64": np.int64, "uint64": np.uint64, "int32": np.int32}
SLICE_ROWS = 65_536  # that are Python objects, or copies, at a time


def slices(num_rows: int) -> Iterator[slice]:
    """Yields the parts of so many rows, in order."""
    for start in range(0, num_rows, SLICE_ROWS):
        yield slice(start, min(start + SLICE_ROWS, num_rows))


# -------------------------------------------------------------------------------------- made of


def text_array(texts: Iterable[str]) -> pa.LargeStringArray:
    """Returns texts as a column."""
    encoded = [text.encode() for text in texts]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return text_array_of(b"".join(encoded), ends)


def text_array_of(data: bytes | np.ndarray, ends: np.ndarray) -> pa.LargeStringArray:
    """Returns a column from its bytes end to end; `ends` is int64 and begins with 0."""
    import pyarrow as pa

    buffers = pa.py_buffer(np.ascontiguousarray(ends, dtype=np.int64)), pa.py_buffer(data)
    return pa.LargeStringArray.from_buffers(len(ends) - 1, *buffers)


def number_array(values: np.ndarray) -> pa.Array:
    """Returns numbers as a column: float64 as they are, whole ones as int64."""
    import pyarrow as pa

    is_float = values.dtype == np.float64
    numbers = np.ascontiguousarray(values, dtype=np.float64 if is_float else np.int64)
    kind = pa.float64() if is_float else pa.int64()
    return pa.Array.from_buffers(kind, len(numbers), [None, pa.py_buffer(numbers)])


def join(columns: Sequence[pa.LargeStringArray]) -> pa.LargeStringArray:
    """Returns columns end to end."""
    import pyarrow as pa

    return pa.concat_arrays(columns) if columns else text_array(())


# -------------------------------------------------------------------------------- asked and taken


def order_of(texts: pa.LargeStringArray) -> np.ndarray:
    """Returns the places (int64) of the texts in the order of their characters; stable."""
    import pyarrow.compute as pc

    # UTF-8 sorts as the characters that it encodes.
    return numbers_of(pc.array_sort_indices(texts)).view(np.int64)


def take(texts: pa.LargeStringArray, places: np.ndarray) -> pa.LargeStringArray:
    """Returns the texts at these places."""
    return texts.take(number_array(places))


def is_in(texts: pa.LargeStringArray, others: pa.LargeStringArray) -> np.ndarray:
    """Returns for each text whether it is among the others."""
    import pyarrow.compute as pc

    return _flags_of(pc.is_in(texts, value_set=others))


def places_in(texts: pa.LargeStringArray, wanted: pa.LargeStringArray) -> np.ndarray:
    """Returns where the wanted texts stand among `texts`, -1 for one that does not."""
    import pyarrow.compute as pc

    found = pc.index_in(wanted, value_set=texts)
    return numbers_of(found.fill_null(-1)).astype(np.int64)


def are_equal(texts: pa.LargeStringArray, others: pa.LargeStringArray) -> np.ndarray:
    """Returns for each pair of texts, of columns of one length, whether they are equal."""
    import pyarrow.compute as pc

    return _flags_of(pc.equal(texts, others))


def numbers_of(column: pa.Array) -> np.ndarray:
    """Returns a column of numbers, none of them null; no copy."""
    if not len(column):
        return np.empty(0, dtype=_DTYPES[str(column.type)])
    numbers = np.frombuffer(column.buffers()[1], dtype=_DTYPES[str(column.type)])
    return numbers[column.offset : column.offset + len(column)]


def _flags_of(column: pa.Array) -> np.ndarray:
    if not len(column):
        return np.empty(0, dtype=np.bool_)
    bits = np.unpackbits(np.frombuffer(column.buffers()[1], dtype=np.uint8), bitorder="little")
    return bits[column.offset : column.offset + len(column)].astype(np.bool_)


# -------------------------------------------------------------------------------- like a tuple


class Texts(Sequence[str]):
    """Texts that are no tuple but read, and compare, like one."""

    @abstractmethod
    def parts(self) -> Iterator[list[str]]:
        """Yields all texts, some at a time."""

    def __iter__(self) -> Iterator[str]:
        for part in self.parts():
            yield from part

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(self))


class TextColumn(Texts):
    """The texts of a column."""

    def __init__(self, texts: pa.LargeStringArray) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> list[str]: ...

    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return list(self.texts[place].to_pylist())
        return str(self.texts[place].as_py())

    def parts(self) -> Iterator[list[str]]:
        """Yields all texts, some at a time."""
        for part in slices(len(self)):
            yield self[part]


# --------------------------------------------------------------------------------------- Parquet


def open_parquet(path: Path) -> pq.ParquetFile:
    """Opens a Parquet file that is read in batches.

    With pyarrow's default, `pre_buffer`, a row group is read whole however little of it is asked
    for, and a pass over the file keeps all groups to its end.
    """
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, pre_buffer=False)


def write_columns(
    path: Path, num_rows: int, columns_of: Callable[[slice], Mapping[str, pa.Array]]
) -> None:
    """Writes a Parquet file, whole or not at all; `columns_of` gives its rows some at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def record(part: slice) -> pa.RecordBatch:
        columns = columns_of(part)
        # Readers of other tools know `string` best.
        texts = {k: v.cast(pa.string()) for k, v in columns.items() if v.type == pa.large_string()}
        return pa.record_batch({**columns, **texts})

    def write(handle: IO[bytes]) -> None:
        first = record(slice(0, 0))
        with pq.ParquetWriter(handle, first.schema) as writer:
            for part in slices(num_rows):
                writer.write_batch(record(part))

    atomic_write(path, write)
