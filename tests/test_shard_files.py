"""Sealed shards: every damage is found, what was never finished counts for nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from pocl_dist.failpoints import VARIABLE, _num_passed
from pocl_dist.files import sha256_bytes
from pocl_dist.shard_files import (
    count_halved,
    damage_of,
    remove_damaged,
    seal_of,
    sealed_shards,
    write_shard,
)

DATA = bytes(range(256))


def test_a_shard_is_what_was_written_and_its_seal_says_so(tmp_path: Path) -> None:
    path = tmp_path / "shard-00001.bin"
    write_shard(path, DATA, num_halved=2)
    write_shard(tmp_path / "shard-00000.bin", b"", num_halved=1)
    assert path.read_bytes() == DATA and sha256_bytes(DATA) in seal_of(path).read_text()
    assert sealed_shards(tmp_path, "shard-*.bin") == [tmp_path / "shard-00000.bin", path]
    assert damage_of(path) is None and count_halved(tmp_path, "shard-*.bin") == 3
    assert remove_damaged(tmp_path, "shard-*.bin") == []


@pytest.mark.parametrize("what", ["data", "seal"])
@pytest.mark.parametrize("how", ["flip", "truncate", "empty", "remove"])
def test_every_damage_is_found_named_and_removed(tmp_path: Path, what: str, how: str) -> None:
    path = tmp_path / "shard-00001.bin"
    write_shard(path, DATA)
    write_shard(tmp_path / "shard-00002.bin", DATA)
    victim = path if what == "data" else seal_of(path)
    content = victim.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    changed = {"flip": flipped, "truncate": content[:-1], "empty": b""}
    if how == "remove":
        victim.unlink()
    elif (what, how) == ("seal", "truncate"):
        victim.write_bytes(content[:-3])  # its last two bytes are a brace and a line feed
    else:
        victim.write_bytes(changed[how])
    damage = remove_damaged(tmp_path, "shard-*.bin")
    if (what, how) == ("seal", "remove"):
        assert damage == []  # the writer was killed before it was done
    else:
        assert len(damage) == 1 and str(path) in damage[0]
    assert [file.name for file in tmp_path.iterdir() if "00001" in file.name] == []
    assert sealed_shards(tmp_path, "shard-*.bin") == [tmp_path / "shard-00002.bin"]


@pytest.mark.parametrize("number", [1, 2])
def test_a_full_disk_leaves_earlier_shards_and_no_half_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write_shard(tmp_path / "shard-00000.bin", DATA)
    _num_passed.clear()
    monkeypatch.setenv(VARIABLE, f"atomic_write.before_rename=enospc@{number}")
    path = tmp_path / "shard-00001.bin"
    with pytest.raises(OSError) as caught:
        write_shard(path, DATA)
    assert str(caught.value.filename).startswith(str(path))
    assert sealed_shards(tmp_path, "shard-*.bin") == [tmp_path / "shard-00000.bin"]
    assert not list(tmp_path.glob(".tmp-*"))
    monkeypatch.delenv(VARIABLE)
    write_shard(path, DATA)
    assert damage_of(path) is None
