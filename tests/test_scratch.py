"""`run.scratch_dir`: compile caches go there, and the teacher cache is read from a checked copy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pocl_dist.distributed.scratch import COMPILE_CACHES, use_scratch
from pocl_dist.errors import ConfigError
from pocl_dist.files import WriteError
from pocl_dist.teacher.cache_files import HEAD, find_damage, tensor_file, write_entry
from tests.ranks import run_ranks_with_errors

NAMES = [HEAD, *(f"shard-{index:05d}-a" for index in range(4))]


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in COMPILE_CACHES:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


def _write_cache(folder: Path) -> Path:
    folder.mkdir()
    for number, name in enumerate(NAMES):
        write_entry(folder, name, {"x": torch.arange(100.0) + number})
    return folder


def _copy(folder: str, scratch: str, world_size: int, local_world_size: int) -> str:
    os.environ |= {"LOCAL_WORLD_SIZE": str(local_world_size), "WORLD_SIZE": str(world_size)}
    from pocl_dist.distributed.process_group import join_process_group
    from pocl_dist.teacher.cache_copy import copy_to_node

    return str(copy_to_node(Path(folder), Path(scratch), join_process_group(30)))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_the_ranks_of_a_node_copy_the_cache_and_mend_a_copy_that_has_changed(
    tmp_path: Path,
) -> None:
    cache, scratch = _write_cache(tmp_path / "cache"), tmp_path / "scratch"
    for is_again in (False, True):
        rows = run_ranks_with_errors(_copy, 2, str(cache), str(scratch), 2, 2)
        assert [error for _, error in rows] == [None, None]
        (target,) = {Path(value) for value, _ in rows}
        assert find_damage(target, NAMES) == []
        for name in NAMES:
            assert tensor_file(target, name).read_bytes() == tensor_file(cache, name).read_bytes()
        if not is_again:
            inodes = {name: tensor_file(target, name).stat().st_ino for name in NAMES}
            _flip(tensor_file(target, NAMES[2]))
    changed = [n for n in NAMES if tensor_file(target, n).stat().st_ino != inodes[n]]
    assert changed == [NAMES[2]], "what is good is not copied again"


def test_a_damaged_cache_is_named_on_all_ranks_and_its_copy_never_used(tmp_path: Path) -> None:
    cache = _write_cache(tmp_path / "cache")
    _flip(tensor_file(cache, NAMES[3]))
    rows = run_ranks_with_errors(_copy, 2, str(cache), str(tmp_path / "scratch"), 2, 2)
    for _, error in rows:
        assert error[0] == "MismatchError" and f"{NAMES[3]}.safetensors: content" in error[1]
    assert not list((tmp_path / "scratch").rglob(f"{NAMES[3]}.*"))


def test_a_damaged_description_is_named_on_all_ranks(tmp_path: Path) -> None:
    cache = _write_cache(tmp_path / "cache")
    (cache / f"{NAMES[1]}.json").write_text("{}")
    for _, error in run_ranks_with_errors(_copy, 2, str(cache), str(tmp_path / "scratch"), 2, 2):
        assert error[0] == "MismatchError" and f"{NAMES[1]}.json" in error[1]


def test_a_scratch_disk_that_cannot_be_used_ends_all_ranks_with_its_key(tmp_path: Path) -> None:
    cache, scratch = _write_cache(tmp_path / "cache"), tmp_path / "scratch"
    scratch.write_text("a file")
    for _, error in run_ranks_with_errors(_copy, 2, str(cache), str(scratch), 2, 2):
        assert error[0] == "StorageError" and "run.scratch_dir: rank 0: cannot make" in error[1]


def test_a_launcher_that_counts_its_ranks_wrongly_is_found_out(tmp_path: Path) -> None:
    cache = _write_cache(tmp_path / "cache")
    ((_, error),) = run_ranks_with_errors(_copy, 1, str(cache), str(tmp_path / "scratch"), 1, 3)
    assert error[0] == "StorageError" and "LOCAL_WORLD_SIZE" in error[1]


@pytest.mark.usefixtures("no_variables")
def test_compile_caches_go_to_scratch_unless_the_user_has_said_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    use_scratch(str(tmp_path / "scratch"), tmp_path / "run")
    own = tmp_path / "scratch" / f"pocl_dist-{os.getuid()}"
    assert own.stat().st_mode & 0o777 == 0o700
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(own / "torch_extensions")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(own / "torchinductor")


@pytest.mark.usefixtures("no_variables")
def test_scratch_in_the_run_directory_or_on_no_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.scratch_dir: .* lies in run_dir"):
        use_scratch(str(tmp_path / "run" / "scratch"), tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError):
        use_scratch(str(tmp_path / "file"), tmp_path / "run")
    use_scratch(None, tmp_path / "run")
    assert not set(COMPILE_CACHES) & set(os.environ)
