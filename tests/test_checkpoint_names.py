"""A checkpoint's manifest is a file too: what it names elsewhere is never used.

The manifest here is right in all but the place: size and sha256 are those of the file outside.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pocl_dist.distributed.checkpoint import FORMAT, MANIFEST, SEAL, find_checkpoint, seal_of
from pocl_dist.distributed.process_group import join_process_group
from pocl_dist.files import JSONValue, atomic_write_json, sha256_file
from tests.ranks import run_ranks_with_errors


def _find(folder: Path) -> int | None:
    found = find_checkpoint(folder, join_process_group(30.0), "run")
    return None if found is None else found.step


@pytest.mark.parametrize("name", ["../../outside", "/etc/hostname"])
def test_a_checkpoint_whose_manifest_names_files_elsewhere_is_used_by_no_rank(
    tmp_path: Path, name: str
) -> None:
    outside = tmp_path / "outside"
    outside.write_text("private")
    folder = tmp_path / "checkpoints"
    named = (folder / "step-00000003" / name).resolve()
    file = outside if named == outside else Path(name)
    row: dict[str, JSONValue] = {
        "path": name, "bytes": file.stat().st_size, "sha256": sha256_file(file),
    }  # fmt: skip
    manifest: dict[str, JSONValue] = {"format": FORMAT, "step": 3, "digests": {"run": "run"}}
    manifest |= {"adam_step": 3, "loss_scale": None, "state": {}, "files": [row]}
    path = folder / "step-00000003" / MANIFEST
    atomic_write_json(path, manifest)
    path.with_name(SEAL).write_text(seal_of(path.read_bytes()))
    errors = [error for _, error in run_ranks_with_errors(_find, 2, folder)]
    assert all(error and error[0] in ("RefusedError", "MismatchError") for error in errors), errors
    assert outside.read_text() == "private"
