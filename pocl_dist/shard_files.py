"""Shards on disk: each written once, whole, and sealed with its hash. Loads no torch.

shard-00017.parquet        the data
shard-00017.parquet.seal   {"bytes", "sha256", "num_halved"}, written after it: data without it
                           were never finished
"""

from __future__ import annotations

from pathlib import Path

from pocl_dist.files import (
    JSONValue,
    atomic_write,
    atomic_write_json,
    read_json,
    sha256_bytes,
    sha256_file,
)


def difference(path: Path, num_bytes: JSONValue, sha256: JSONValue) -> str | None:
    """Returns how a file differs from what was written, None when it does not."""
    if not path.exists():
        return f"{path}: missing"
    if path.stat().st_size != num_bytes:
        return f"{path}: {path.stat().st_size} bytes, expected {num_bytes}"
    if sha256_file(path) != sha256:
        return f"{path}: content changed (sha256 differs)"
    return None


def seal_of(path: Path) -> Path:
    """Returns the file beside a shard that makes it count."""
    return path.with_name(f"{path.name}.seal")


def write_shard(path: Path, data: bytes, num_halved: int = 0) -> None:
    """Writes a shard, then its seal; `num_halved` of its batches did not fit into memory whole."""
    seal_of(path).unlink(missing_ok=True)  # it would describe other data
    atomic_write(path, lambda handle: handle.write(data))
    seal = {"bytes": len(data), "sha256": sha256_bytes(data), "num_halved": num_halved}
    atomic_write_json(seal_of(path), seal)


def sealed_shards(folder: Path, pattern: str) -> list[Path]:
    """Returns the shards that were finished, sorted by name."""
    found = sorted(folder.glob(f"{pattern}.seal"))
    return [path.with_name(path.name.removesuffix(".seal")) for path in found]


def damage_of(path: Path) -> str | None:
    """Returns how a sealed shard differs from what was written, None when it does not."""
    try:
        seal = read_json(seal_of(path))
        return difference(path, seal["bytes"], seal["sha256"])
    except (KeyError, ValueError) as error:
        return f"{seal_of(path)}: is no seal ({error!r})"


def remove_damaged(folder: Path, pattern: str) -> list[str]:
    """Removes what is not as it was written, and what killed writers left; returns the damage."""
    for path in folder.glob(".tmp-*"):
        path.unlink(missing_ok=True)
    sealed = sealed_shards(folder, pattern)
    for path in set(folder.glob(pattern)) - set(sealed):
        path.unlink()
    found = {path: damage for path in sealed if (damage := damage_of(path)) is not None}
    for path in found:
        seal_of(path).unlink()
        path.unlink(missing_ok=True)
    return list(found.values())


def count_halved(folder: Path, pattern: str) -> int:
    """Returns how many batches of all sealed shards did not fit into memory whole."""
    seals = [read_json(seal_of(path)) for path in sealed_shards(folder, pattern)]
    return sum(int(str(seal["num_halved"])) for seal in seals)
