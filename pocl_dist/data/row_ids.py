"""Ids of rows: given ones, else a hash of the content, `-2` and `-3` for identical rows.

What was seen is kept as 64-bit keys in sorted arrays, 12 bytes each: dictionaries of ten million
texts would take gigabytes. The key of a content hash is the hash itself; two given ids with one
key by chance (one data set of ten million rows in 300,000) would be refused as the same.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pocl_dist.data.row_form import BadRowError
from pocl_dist.files import sha256_bytes
from pocl_dist.guards import shown
from pocl_dist.records import Example

_CONTENT_HASH = re.compile("[0-9a-f]{16}")


def content_of(example: Example) -> str:
    """Returns the JSON of all that makes a row what it is besides its id."""
    return json.dumps([example.prompt, example.context, example.references, example.history])


@dataclass(frozen=True)
class ParsedRow:
    """A row as its source numbers it, or the reason why it is none; `content` as `content_of`."""

    number: int
    example: Example | BadRowError
    content: str = ""


class FirstRows:
    """Remembers in which row a key was first seen: sorted runs that are merged as they grow."""

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []

    def find(self, keys: Sequence[int]) -> list[int]:
        """Returns the row of each key, 0 for one that was not seen."""
        wanted = np.array(keys, dtype=np.uint64)
        found = np.zeros(len(wanted), dtype=np.uint32)
        for run_keys, run_rows in self._runs:
            at = np.minimum(np.searchsorted(run_keys, wanted), len(run_keys) - 1)
            found = np.where(run_keys[at] == wanted, run_rows[at], found)
        return found.tolist()

    def add(self, row_of_key: dict[int, int]) -> None:
        """Adds keys that were not seen before."""
        if not row_of_key:
            return
        keys = np.fromiter(row_of_key.keys(), np.uint64, len(row_of_key))
        rows = np.fromiter(row_of_key.values(), np.uint32, len(row_of_key))
        order = np.argsort(keys)
        self._runs.append((keys[order], rows[order]))
        while len(self._runs) > 1 and len(self._runs[-2][0]) <= 2 * len(self._runs[-1][0]):
            last, before = self._runs.pop(), self._runs.pop()
            keys = np.concatenate([before[0], last[0]])
            order = np.argsort(keys, kind="stable")
            self._runs.append((keys[order], np.concatenate([before[1], last[1]])[order]))


class RowIds:
    """Gives the rows of one source their ids, a part at a time."""

    def __init__(self) -> None:
        self._ids = FirstRows()
        self._contents = FirstRows()
        self._num_same: dict[int, int] = {}  # of contents that were seen more than once

    def give(self, rows: Sequence[ParsedRow]) -> Iterator[ParsedRow]:
        """Yields the rows with their ids, in order; one whose id another has is a bad row."""
        names = self._names(rows)
        keys = [_key_of(name) for name in names]
        earlier = self._ids.find(keys)
        new: dict[int, int] = {}
        for row, name, key, first in zip(rows, names, keys, earlier, strict=True):
            if isinstance(row.example, BadRowError):
                yield row
                continue
            first = first or new.get(key, 0)
            if first:
                reason = f"id {shown(name)} is that of row {first} too"
                yield ParsedRow(row.number, BadRowError(reason))
                continue
            new[key] = row.number
            yield ParsedRow(row.number, _with_id(row.example, name), row.content)
        self._ids.add(new)

    def _names(self, rows: Sequence[ParsedRow]) -> list[str]:
        """Returns the ids of rows, empty for a bad one."""
        names = [
            "" if isinstance(row.example, BadRowError) else row.example.example_id for row in rows
        ]
        without = [
            index
            for index, row in enumerate(rows)
            if not names[index] and not isinstance(row.example, BadRowError)
        ]
        hashes = [sha256_bytes(rows[index].content.encode())[:16] for index in without]
        keys = [int(name, 16) for name in hashes]
        new: dict[int, int] = {}
        for index, name, key, first in zip(
            without, hashes, keys, self._contents.find(keys), strict=True
        ):
            if first or key in new:
                number = self._num_same[key] = self._num_same.get(key, 1) + 1
                names[index] = f"{name}-{number}"
            else:
                new[key] = rows[index].number
                names[index] = name
        self._contents.add(new)
        return names


def _key_of(name: str) -> int:
    if _CONTENT_HASH.fullmatch(name):
        return int(name, 16)
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def _with_id(example: Example, name: str) -> Example:
    if example.example_id:
        return example
    return Example(name, example.prompt, example.context, example.references, example.history)
