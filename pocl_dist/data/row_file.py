"""Rows on disk, read one at a time: what a source held, in one form whatever the source was.

rows.jsonl       a line of JSON [id, prompt, context, references, history] for each usable row
row_ends.i64     where the lines end, from 0 on: int64, little-endian
ids.utf8         the ids end to end
id_ends.i64      where they end, from 0 on
index.json       what it was made from, digests, and the rows that were left out; written last

A row is read by its number, so a process holds none of them, and pages of a memory map would count
as its memory. A byte offset into the source itself would do for JSONL, but not for Parquet, where a
row costs its whole row group, and each rank would have to parse and check it again.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, overload

import numpy as np

from pocl_dist.data.columns import text_array_of
from pocl_dist.data.row_ids import ParsedRow
from pocl_dist.records import Example

if TYPE_CHECKING:
    import pyarrow as pa

LINES, LINE_ENDS, IDS, ID_ENDS = "rows.jsonl", "row_ends.i64", "ids.utf8", "id_ends.i64"
FILES = (LINES, LINE_ENDS, IDS, ID_ENDS)
_NUMBER_BYTES = 8
_FLUSH_ROWS = 65_536


class RowFile(Sequence[Example]):
    """The rows in a folder; any number of processes and threads may read them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lines = (folder / LINES).open("rb")
        self._ends = (folder / LINE_ENDS).open("rb")
        self._num_rows = os.fstat(self._ends.fileno()).st_size // _NUMBER_BYTES - 1

    def __len__(self) -> int:
        return self._num_rows

    @overload
    def __getitem__(self, place: int) -> Example: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[Example, ...]: ...

    def __getitem__(self, place: int | slice) -> Example | tuple[Example, ...]:
        if isinstance(place, slice):
            return tuple(self[row] for row in range(*place.indices(len(self))))
        row = range(len(self))[place]  # an IndexError ends a loop over a Sequence
        bounds = os.pread(self._ends.fileno(), 2 * _NUMBER_BYTES, row * _NUMBER_BYTES)
        start, end = np.frombuffer(bounds, dtype="<i8").tolist()
        return _example(os.pread(self._lines.fileno(), end - start, start))

    def __iter__(self) -> Iterator[Example]:
        with (self._folder / LINES).open("rb") as lines:
            for line in lines:
                yield _example(line)

    def ids(self) -> pa.LargeStringArray:
        """Returns the ids of all rows, in their order."""
        data = np.fromfile(self._folder / IDS, dtype=np.uint8)
        return text_array_of(data, np.fromfile(self._folder / ID_ENDS, dtype="<i8"))


def _example(line: bytes) -> Example:
    name, prompt, context, references, history = json.loads(line)
    turns = tuple((role, text) for role, text in history)
    return Example(name, prompt, context, tuple(references), turns)


def write_row_file(folder: Path, rows: Iterable[ParsedRow]) -> Iterator[Example]:
    """Writes the rows into an empty folder, all but `index.json`; yields them as they pass."""
    line_end = id_end = 0
    line_ends, id_ends = array("q", [0]), array("q", [0])
    with (
        (folder / LINES).open("wb") as lines,
        (folder / IDS).open("wb") as ids,
        (folder / LINE_ENDS).open("wb") as line_end_file,
        (folder / ID_ENDS).open("wb") as id_end_file,
    ):
        for row in rows:
            assert isinstance(row.example, Example), "only usable rows are kept"
            name = row.example.example_id
            quoted = f'"{name}"' if name.isascii() and name.isalnum() else json.dumps(name)
            line_end += lines.write(f"[{quoted}, {row.content[1:]}\n".encode())
            id_end += ids.write(name.encode())
            line_ends.append(line_end)
            id_ends.append(id_end)
            if len(line_ends) >= _FLUSH_ROWS:
                _flush(line_end_file, line_ends)
                _flush(id_end_file, id_ends)
            yield row.example
        _flush(line_end_file, line_ends)
        _flush(id_end_file, id_ends)


def _flush(handle: IO[bytes], numbers: array[int]) -> None:
    handle.write(np.array(numbers, dtype="<i8").tobytes())
    del numbers[:]
