"""Hub id, JSONL or Parquet -> rows, one after the other, and a seal that tells a changed source.

`datasets` by itself accepts nulls, duplicate ids and mixed types in silence and refuses broken
lines without naming them, so files are read here, strictly; hub ids go through `datasets`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pocl_dist.data.columns import open_parquet
from pocl_dist.data.row_form import MAX_ROW_BYTES, BadRowError, parse_line
from pocl_dist.errors import DataError, MissingInputError, UnavailableError
from pocl_dist.files import JSONValue, package_file, sha256_file

if TYPE_CHECKING:
    import datasets

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
PARQUET_BATCH_ROWS = 4096  # that are held as Python objects
Numbered = tuple[int, "dict[str, object] | BadRowError"]


class RowStream(Protocol):
    """A source whose rows are read one after the other."""

    source: str

    def rows(self) -> Iterator[Numbered]:
        """Yields (number, row or why it is none) from the first on."""
        ...

    def seal(self) -> JSONValue:
        """Returns what tells the part that was read from a changed one; `is_sealed` compares."""
        ...

    def is_sealed(self, seal: JSONValue) -> bool:
        """Returns whether the source still holds what the seal was made of."""
        ...


def _sha256_start(path: Path, num_bytes: int) -> str:
    """Returns the hex sha256 of the first `num_bytes` of a file, read in pieces."""
    found = hashlib.sha256()
    with path.open("rb") as handle:
        while num_bytes and (piece := handle.read(min(num_bytes, 1 << 20))):
            found.update(piece)
            num_bytes -= len(piece)
    return found.hexdigest()


class JsonlRows:
    """A file of one JSON object per line."""

    def __init__(self, source: str, path: Path) -> None:
        self.source = source
        self._path = path
        self._num_read = 0

    def rows(self) -> Iterator[Numbered]:
        """Yields the lines that are not blank, numbered from 1 with the blank ones."""
        with self._path.open("rb") as handle:
            number = self._num_read = 0
            while line := handle.readline(MAX_ROW_BYTES + 1):
                number += 1
                is_too_long = len(line) > MAX_ROW_BYTES
                rest = line
                self._num_read += len(line)
                while is_too_long and rest and not rest.endswith(b"\n"):  # without being held
                    rest = handle.readline(MAX_ROW_BYTES)
                    self._num_read += len(rest)
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not is_too_long and not line.strip():
                    continue
                try:
                    yield number, parse_line(line)
                except BadRowError as error:
                    yield number, error

    def seal(self) -> JSONValue:
        """Returns the size of the part that was read, whether it is all, and its sha256."""
        is_all = self._num_read == self._path.stat().st_size
        return [self._num_read, is_all, _sha256_start(self._path, self._num_read)]

    def is_sealed(self, seal: JSONValue) -> bool:
        """Returns whether the file still begins with that, and ends with it if it did."""
        num_bytes, is_all = seal[:2] if isinstance(seal, list) and len(seal) == 3 else (None, None)
        if not isinstance(num_bytes, int) or not isinstance(is_all, bool):
            return False
        size = self._path.stat().st_size
        is_as_long = size == num_bytes if is_all else size >= num_bytes
        return is_as_long and [num_bytes, is_all, _sha256_start(self._path, num_bytes)] == seal


class ParquetRows:
    """A Parquet file; a null is a field that is missing."""

    def __init__(self, source: str, path: Path) -> None:
        self.source = source
        self._path = path

    def rows(self) -> Iterator[Numbered]:
        """Yields the rows, numbered from 1."""
        from pyarrow import ArrowException

        number = 0
        try:
            for batch in open_parquet(self._path).iter_batches(PARQUET_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {key: value for key, value in row.items() if value is not None}
        except (
            ArrowException,
            OSError,
            UnicodeDecodeError,
        ) as error:  # damaged files raise any of these
            raise DataError(
                f"{self._path}: not a readable Parquet file, after row {number}: {error}"
            ) from error

    def seal(self) -> JSONValue:
        """Returns the file's sha256."""
        return sha256_file(self._path)

    def is_sealed(self, seal: JSONValue) -> bool:
        """Returns whether the file still has that sha256."""
        return self.seal() == seal


class HubRows:
    """A data set of the hub, NAME@REVISION#SPLIT."""

    def __init__(self, source: str) -> None:
        self.source = source

    def _load(self) -> datasets.Dataset:
        import datasets

        name, _, split = self.source.partition("#")
        name, _, revision = name.partition("@")
        try:
            return datasets.load_dataset(name, split=split or "train", revision=revision or None)
        except (ConnectionError, OSError) as error:
            raise UnavailableError(
                f"data set {self.source!r} is no local file and the hub gave: {error}"
            ) from error
        except ValueError as error:
            raise DataError(f"data set {self.source!r}: {error}") from error

    def rows(self) -> Iterator[Numbered]:
        """Yields the rows, numbered from 1."""
        for number, row in enumerate(self._load(), start=1):
            yield number, {key: value for key, value in row.items() if value is not None}

    def seal(self) -> JSONValue:
        """Returns the fingerprint that `datasets` gives to this data set at this commit."""
        return str(self._load()._fingerprint)

    def is_sealed(self, seal: JSONValue) -> bool:
        """Returns whether the hub, or its local copy, still has that data set."""
        return self.seal() == seal


def rows_file(source: str, key: str) -> Path | None:
    """Returns the file that the config key `key` names, None for a data set of the hub.

    Raises MissingInputError (66) for what is neither, or may not be read.
    """
    try:
        path = package_file(source) if source.startswith("package:") else Path(source)
    except FileNotFoundError as error:
        raise MissingInputError(f"{key}: {source!r}: {error}") from error
    if path.is_file():
        if not os.access(path, os.R_OK):
            raise MissingInputError(f"{key}: {source} may not be read (looked at {path.resolve()})")
        return path
    looks_like_hub_id = source.partition("@")[0].partition("#")[0].count("/") == 1
    if path.suffix in FILE_SUFFIXES or path.is_dir() or not looks_like_hub_id:
        what = "is a folder" if path.is_dir() else "does not exist"
        raise MissingInputError(f"{key}: {source} {what} (looked at {path.resolve()})")
    return None


def open_rows(source: str, key: str) -> RowStream:
    """Returns the rows that the config key `key` names; raises as `rows_file` does."""
    path = rows_file(source, key)
    if path is None:
        return HubRows(source)
    return ParquetRows(source, path) if path.suffix == ".parquet" else JsonlRows(source, path)
