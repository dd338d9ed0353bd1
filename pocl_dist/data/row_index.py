"""A source read once into a folder of its own, and only opened after that. See `row_file`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pocl_dist.data.row_file import FILES, RowFile, write_row_file
from pocl_dist.data.row_streams import RowStream, open_rows
from pocl_dist.data.sources import BadRow, RowPolicy, Rows, digest_item, usable_rows
from pocl_dist.errors import MismatchError, MissingInputError
from pocl_dist.files import (
    JSONValue,
    atomic_write_json,
    digest_of,
    json_text,
    new_folder,
    read_json,
    sha256_file,
)
from pocl_dist.list_digest import ListDigest

_INDEX = "index.json"
_FORMAT = 1


@dataclass(frozen=True)
class _Index:
    """What `index.json` says."""

    source: str
    limit: int | None
    seal: JSONValue  # of the source
    bad_rows: tuple[BadRow, ...]
    digest: str
    sha256: dict[str, str]  # of the files beside it

    def to_json(self) -> dict[str, JSONValue]:
        bad: list[JSONValue] = [[row.row, row.reason] for row in self.bad_rows]
        value: dict[str, JSONValue] = {
            "format": _FORMAT,
            "source": self.source,
            "limit": self.limit,
            "seal": self.seal,
            "bad_rows": bad,
            "digest": self.digest,
            "sha256": dict(self.sha256),
        }
        return {**value, "own digest": digest_of(value)}

    def damaged_files(self, sha256_of: Callable[[Path], str], folder: Path) -> list[Path]:
        """Returns the files beside it that are missing or not as they were written."""
        paths = [folder / name for name in FILES]
        return [
            path
            for path in paths
            if not path.exists() or sha256_of(path) != self.sha256.get(path.name)
        ]


def index_rows(source: str, key: str, folder: Path, policy: RowPolicy) -> Rows:
    """Returns the rows of a source, which lie in `folder`; reads the source if they do not.

    Raises as `read_rows` does. The rows are read again when the source, its limit or a file of the
    folder is not what it was.
    """
    stream = open_rows(source, key)
    found = _read_index(folder)
    if found is None or _difference(found, folder, stream, policy.limit):
        return _read_into(folder, stream, policy)
    return _rows(found, folder, policy)


def open_index(source: str, key: str, folder: Path, policy: RowPolicy) -> Rows:
    """Returns the rows that `index_rows` put into `folder`; reads no source and writes nothing.

    Raises MissingInputError (66) when they are not there, MismatchError (78) when the source was
    changed since, or a file is damaged.
    """
    stream = open_rows(source, key)
    found = _read_index(folder)
    if found is None:
        raise MissingInputError(
            f"{key}: {folder} does not hold the rows of {source}: run `pocl-dist plan` first"
        )
    if difference := _difference(found, folder, stream, policy.limit):
        raise MismatchError(f"{key}: {difference}; run `pocl-dist plan` again")
    return _rows(found, folder, policy)


def _rows(found: _Index, folder: Path, policy: RowPolicy) -> Rows:
    policy.check(found.bad_rows)
    return Rows(found.source, RowFile(folder), found.bad_rows, found.digest)


def _read_into(folder: Path, stream: RowStream, policy: RowPolicy) -> Rows:
    bad_rows: list[BadRow] = []
    digest = ListDigest()
    with new_folder(folder) as temporary:
        for example in write_row_file(temporary, usable_rows(stream, policy, bad_rows)):
            digest.add(digest_item(example))
        index = _Index(
            stream.source,
            policy.limit,
            stream.seal(),
            tuple(bad_rows),
            digest.hexdigest(),
            {name: sha256_file(temporary / name) for name in FILES},
        )
        atomic_write_json(temporary / _INDEX, index.to_json())
    return _rows(index, folder, policy)


def _read_index(folder: Path) -> _Index | None:
    """Returns what was written; None for nothing, another version's or one that is damaged."""
    path = folder / _INDEX
    try:
        value = read_json(path)
        source, bad = str(value["source"]), cast("list[tuple[int, str]]", value["bad_rows"])
        index = _Index(
            source,
            cast("int | None", value["limit"]),
            value["seal"],
            tuple(BadRow(source, int(row), str(reason)) for row, reason in bad),
            str(value["digest"]),
            dict(cast("dict[str, str]", value["sha256"])),
        )
        is_whole = json_text(index.to_json()) == path.read_text(encoding="utf-8")
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None
    return index if is_whole else None


def damaged_files(folder: Path, sha256_of: Callable[[Path], str]) -> list[Path]:
    """Returns the files of a folder that `index_rows` wrote which are not as they were written."""
    index = _read_index(folder)
    return [folder / _INDEX] if index is None else index.damaged_files(sha256_of, folder)


def _difference(found: _Index, folder: Path, stream: RowStream, limit: int | None) -> str:
    """Returns how the source or a file of the folder differs from what was written, if it does.

    The files are hashed like all that a step reads: a lost bit would train on another row.
    """
    if (found.source, found.limit) != (stream.source, limit):
        return f"{folder} holds the rows of {found.source} (limit {found.limit})"
    if not stream.is_sealed(found.seal):
        return f"{stream.source} was changed since its rows were read"
    damaged = found.damaged_files(sha256_file, folder)
    return f"{damaged[0]} is damaged (sha256 differs)" if damaged else ""
