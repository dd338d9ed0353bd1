"""The files under `teacher_cache/`: written by the cache pass, read by distill. No torch is loaded.

inputs.json               what the cache is made from; written before the first shard
head.safetensors          the teacher's head, once (cache_hidden only)
shard-00017-X.safetensors what the teacher says of some rows: one tensor per kind, the label
                          positions of its rows end to end; X is a digest of the rows
head.json, shard-*.json   size and sha256 of the tensors, and which positions belong to which row;
                          written after them: tensors without it were never finished
summary.json              counts, bytes, truncation error; written last
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pocl_dist.files import (
    JSONValue,
    atomic_write,
    atomic_write_json,
    read_json,
    sha256_bytes,
)
from pocl_dist.records import EncodedExample
from pocl_dist.shard_files import difference
from pocl_dist.teacher.cache_work import CacheShard, content_hash

if TYPE_CHECKING:
    import torch

HEAD = "head"
HIDDEN = "hidden_NH"
TOKEN_IDS, LOGPROBS, LOG_TAIL = "token_ids_NK", "logprobs_NK", "log_tail_N"


@dataclass(frozen=True)
class CachedRow:
    """One row of a shard."""

    example_id: str
    content_hash: str
    num_labels: int


@dataclass(frozen=True)
class CacheEntry:
    """What the JSON beside a file of tensors says about it."""

    name: str
    num_bytes: int
    sha256: str
    rows: tuple[CachedRow, ...] = ()
    truncation_sums: Mapping[str, float] | None = None  # temperature -> sum over label positions
    scalars: Mapping[str, JSONValue] | None = None  # of the head
    num_halved: int = 0  # batches that did not fit into memory whole

    @property
    def num_labels(self) -> int:
        """Returns the label positions of all its rows."""
        return sum(row.num_labels for row in self.rows)

    def to_json(self) -> dict[str, JSONValue]:
        """Returns the JSON form; rows are lists, there are many of them."""
        return {
            "bytes": self.num_bytes,
            "sha256": self.sha256,
            "rows": [[row.example_id, row.content_hash, row.num_labels] for row in self.rows],
            "truncation_sums": None if self.truncation_sums is None else dict(self.truncation_sums),
            "scalars": None if self.scalars is None else dict(self.scalars),
            "num_halved": self.num_halved,
        }


@dataclass(frozen=True)
class Place:
    """Where the positions of a row lie."""

    shard: str
    start: int
    stop: int
    content_hash: str


@dataclass(frozen=True)
class Damage:
    """A file of the cache that is not what was written, and how that shows."""

    name: str
    reason: str


def tensor_file(folder: Path, name: str) -> Path:
    """Returns the path of an entry's tensors."""
    return folder / f"{name}.safetensors"


def rows_of(shard: CacheShard) -> tuple[CachedRow, ...]:
    """Returns what a shard's JSON says of its rows."""
    return tuple(
        CachedRow(row.example_id, content_hash(row), row.num_response_tokens)
        for row in shard.examples
    )


def write_entry(
    folder: Path,
    name: str,
    tensors: Mapping[str, torch.Tensor],
    rows: tuple[CachedRow, ...] = (),
    truncation_sums: Mapping[str, float] | None = None,
    scalars: Mapping[str, JSONValue] | None = None,
    num_halved: int = 0,
) -> CacheEntry:
    """Writes tensors, then the JSON that makes them count; an earlier entry is replaced."""
    from safetensors.torch import save

    data = save({key: value.contiguous() for key, value in tensors.items()})
    (folder / f"{name}.json").unlink(missing_ok=True)  # it would describe other tensors
    atomic_write(tensor_file(folder, name), lambda handle: handle.write(data))
    sha256 = sha256_bytes(data)
    entry = CacheEntry(name, len(data), sha256, rows, truncation_sums, scalars, num_halved)
    atomic_write_json(folder / f"{name}.json", entry.to_json())
    return entry


def read_entry(folder: Path, name: str) -> CacheEntry:
    """Returns an entry; raises ValueError when its JSON is none of ours."""
    value = read_json(folder / f"{name}.json")
    try:
        rows = cast("list[tuple[str, str, int]]", value["rows"])
        return CacheEntry(
            name=name,
            num_bytes=int(cast("int", value["bytes"])),
            sha256=str(value["sha256"]),
            rows=tuple(CachedRow(str(a), str(b), int(c)) for a, b, c in rows),
            truncation_sums=cast("dict[str, float] | None", value["truncation_sums"]),
            scalars=cast("dict[str, JSONValue] | None", value["scalars"]),
            num_halved=int(cast("int", value["num_halved"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / name}.json describes no shard: {error!r}") from error


def entry_names(folder: Path) -> list[str]:
    """Returns the names of all entries, the head among them, sorted."""
    names = [path.stem for path in folder.glob("shard-*.json")]
    return sorted([*names, *([HEAD] if (folder / f"{HEAD}.json").exists() else [])])


def damage_of(folder: Path, name: str) -> Damage | None:
    """Returns how an entry's tensors differ from what was written, None when they do not."""
    path = tensor_file(folder, name)
    try:
        entry = read_entry(folder, name)
    except ValueError as error:
        return Damage(name, str(error))
    reason = difference(path, entry.num_bytes, entry.sha256)
    return None if reason is None else Damage(name, reason)


def find_damage(folder: Path, names: Iterable[str]) -> list[Damage]:
    """Returns the damaged ones of the entries; reads every byte of them."""
    return [damage for name in names if (damage := damage_of(folder, name)) is not None]


def remove_entry(folder: Path, name: str) -> None:
    """Removes an entry, its JSON first."""
    (folder / f"{name}.json").unlink(missing_ok=True)
    tensor_file(folder, name).unlink(missing_ok=True)


def remove_torn_files(folder: Path) -> None:
    """Removes temporary files and tensors without their JSON: what killed writers left."""
    for path in folder.glob(".tmp-*"):
        path.unlink(missing_ok=True)
    known = set(entry_names(folder))
    for path in folder.glob("*.safetensors"):
        if path.stem not in known:
            path.unlink(missing_ok=True)


def read_shards(folder: Path) -> list[CacheEntry]:
    """Returns the entries of all shards."""
    return [read_entry(folder, name) for name in entry_names(folder) if name != HEAD]


def read_index(entries: Sequence[CacheEntry]) -> dict[str, Place]:
    """Returns {example id: where its positions lie}; of a row that lies twice, the last."""
    index: dict[str, Place] = {}
    for entry in entries:
        start = 0
        for row in entry.rows:
            stop = start + row.num_labels
            index[row.example_id] = Place(entry.name, start, stop, row.content_hash)
            start = stop
    return index


def is_cached(index: Mapping[str, Place], example: EncodedExample) -> bool:
    """Returns whether a row, as it is encoded now, is in the cache."""
    place = index.get(example.example_id)
    return place is not None and place.content_hash == content_hash(example)
