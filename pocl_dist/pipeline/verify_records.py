"""What the links of `verify` look at: the records of a run and the hash of every file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pocl_dist.config import Config
from pocl_dist.files import JSONValue, read_json
from pocl_dist.pipeline.run_directory import RunDirectory

Record = Mapping[str, JSONValue]


@dataclass(frozen=True)
class Chain:
    """The run, its config, and the hash of every file that could be read."""

    run: RunDirectory
    config: Config
    sha256: Mapping[str, str]

    def record(self, name: str) -> Record:
        """Returns a record of the run; empty when it is not there (the manifest tells)."""
        return read_json(self.run.root / name) if name in self.sha256 else {}

    def names(self, folder: str, suffix: str = "") -> list[str]:
        """Returns the files below a folder, sorted."""
        return sorted(
            name for name in self.sha256 if name.startswith(folder) and name.endswith(suffix)
        )


def differing(name: str, found: Record, expected: Record, source: str) -> Iterator[str]:
    """Yields a finding for each key in which the record `name` is not what `source` says."""
    for key, value in sorted(expected.items()):
        if found.get(key) != value:
            yield f"{name}: {key} is {found.get(key)!r}, in {source} {value!r}"


def same(name: str, key: str, record: Record, other: str, other_key: str, theirs: Record) -> str:
    """Returns a finding when two records name different digests of the same thing."""
    mine, expected = record.get(key), theirs.get(other_key)
    if not record or not theirs or mine == expected:
        return ""
    return f"{name}: {key} is {mine}, but {other} has {expected}"
