"""Files: whole or not at all, and a manifest that finds every change."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import IO

import pytest

from pocl_dist.files import (
    atomic_write,
    atomic_write_json,
    atomic_write_text,
    digest_of,
    explain_storage_error,
    free_bytes,
    package_file,
    read_json,
    read_json_lines,
    sha256_bytes,
    sha256_file,
)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic_write_text(path, "old")

    def half(handle: IO[bytes]) -> None:
        handle.write(b"half of the new")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError) as caught:
        atomic_write(path, half)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    explained = explain_storage_error(caught.value)
    assert explained is not None and str(path) in explained and "disk full" in explained


def test_folders_are_made_and_the_new_content_replaces_the_old(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.json"
    atomic_write_json(path, {"a": [1, 2.5, None, "é"]})
    atomic_write_json(path, {"b": 1e-300})
    assert read_json(path) == {"b": 1e-300}
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_a_number_that_is_not_finite_is_never_written_as_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        atomic_write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_only_errors_of_the_disk_are_explained() -> None:
    assert explain_storage_error(FileNotFoundError(errno.ENOENT, "no", "x")) is None
    read_only = explain_storage_error(OSError(errno.EROFS, "Read-only file system", "/x/y"))
    assert read_only == "cannot write /x/y: Read-only file system"


def test_json_that_is_damaged_or_no_object_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in (b"", b"{", b"[1]", b"\xff", b"null"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.json"):
            read_json(path)


def test_a_torn_last_line_is_dropped_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert read_json_lines(path) == []
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": 3')
    assert read_json_lines(path) == [{"a": 1}, {"a": 2}]


def test_digests_are_those_of_hashlib_and_blind_to_the_order_of_keys(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert sha256_file(tmp_path / "a") == sha256_bytes(b"abc") == known
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": "1"}) != digest_of({"a": 1.5})


def test_a_path_that_does_not_exist_has_the_free_bytes_of_its_disk(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "yet") > 0


def test_a_file_of_a_package_is_found_and_none_outside_of_it() -> None:
    assert package_file("package:pocl_dist/bundled/train.jsonl").is_file()
    outside = [
        "package:pocl_dist/../setup.py",
        "package:pocl_dist//etc/passwd",
        "package:pocl_dist",
    ]
    for reference in [*outside, "package:no_such_package/x", "package:os/x", "package:a.b/x"]:
        with pytest.raises(FileNotFoundError):
            package_file(reference)
