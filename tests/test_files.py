"""Files: whole or not at all, and a manifest that finds every change."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import IO

import pytest

from pocl_dist.files import (
    MANIFEST_NAME,
    SEAL_NAME,
    atomic_write,
    atomic_write_json,
    atomic_write_text,
    digest_of,
    explain_storage_error,
    free_bytes,
    list_files,
    package_file,
    read_json,
    read_json_lines,
    sha256_bytes,
    sha256_file,
    verify_manifest,
    write_manifest,
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


# --- manifest


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    root = tmp_path / "run"
    atomic_write_text(root / "export" / "model.bin", "weights")
    atomic_write_text(root / "plan.json", "{}")
    atomic_write_text(root / "export" / "with space é.txt", "x")
    for live in ("lock", "status.json", "control/stop", ".tmp-plan.json-1", "export/.tmp-x/y"):
        atomic_write_text(root / live, "lives on")
    write_manifest(root)
    return root


def test_a_sealed_folder_verifies_and_live_files_are_no_part_of_it(sealed: Path) -> None:
    assert list_files(sealed) == ["export/model.bin", "export/with space é.txt", "plan.json"]
    assert verify_manifest(sealed) == []
    atomic_write_text(sealed / "status.json", "changed")
    atomic_write_text(sealed / "control" / "save", "")
    assert verify_manifest(sealed) == []


def test_every_kind_of_change_is_found_and_named(sealed: Path) -> None:
    (sealed / "export" / "model.bin").write_text("weighty")  # one character, same length
    (sealed / "plan.json").unlink()
    (sealed / "export" / "with space é.txt").write_text("xx")
    (sealed / "export" / "more.bin").write_text("smuggled")
    assert verify_manifest(sealed) == [
        "export/model.bin: content changed (sha256 differs)",
        "export/with space é.txt: 2 bytes, expected 1",
        "plan.json: missing",
        "export/more.bin: not listed in manifest.json",
    ]


def test_a_changed_manifest_does_not_match_its_seal(sealed: Path) -> None:
    path = sealed / MANIFEST_NAME
    path.write_text(path.read_text().replace("plan.json", "plans.json"))
    assert verify_manifest(sealed) == ["manifest.json: does not match manifest.json.sha256"]
    (sealed / SEAL_NAME).write_text("")
    assert verify_manifest(sealed) == ["manifest.json: does not match manifest.json.sha256"]
    (sealed / SEAL_NAME).unlink()
    assert "is missing" in verify_manifest(sealed)[0]


def _reseal(root: Path, value: object) -> None:
    atomic_write_text(root / MANIFEST_NAME, json.dumps(value))
    atomic_write_text(root / SEAL_NAME, f"{sha256_file(root / MANIFEST_NAME)}  {MANIFEST_NAME}\n")


def test_a_manifest_cannot_point_out_of_its_folder(sealed: Path) -> None:
    value = read_json(sealed / MANIFEST_NAME)
    rows = [{"path": path, "bytes": 1, "sha256": "x"} for path in ("../x", "/etc/hostname")]
    _reseal(sealed, {**value, "files": [*value["files"], *rows]})  # type: ignore[misc]
    findings = verify_manifest(sealed)
    assert len(findings) == 2 and all("leaves" in finding for finding in findings)


@pytest.mark.parametrize("value", [{}, {"files": 3}, {"files": [3]}, {"files": [{"path": "a"}]}])
def test_a_manifest_that_is_none_is_a_finding_and_not_a_crash(sealed: Path, value: object) -> None:
    _reseal(sealed, value)
    assert verify_manifest(sealed) == ["manifest.json: is no manifest"]


def test_sealing_again_follows_what_changed(sealed: Path) -> None:
    before = (sealed / MANIFEST_NAME).read_bytes()
    write_manifest(sealed)
    assert (sealed / MANIFEST_NAME).read_bytes() == before
    atomic_write_text(sealed / "plan.json", '{"a": 1}')
    atomic_write_text(sealed / "new.txt", "new")
    write_manifest(sealed)
    assert verify_manifest(sealed) == []
    assert (sealed / MANIFEST_NAME).read_bytes() != before
