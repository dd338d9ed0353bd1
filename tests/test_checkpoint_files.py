"""A checkpoint's files, without training: what is committed, what counts as damage, what stays."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pocl_dist.distributed.checkpoint import (
    FORMAT,
    MANIFEST,
    SEAL,
    committed_steps,
    damage_of,
    read_checkpoint,
    seal_of,
    share_name,
    step_folder,
)
from pocl_dist.distributed.checkpoint_commit import Save, commit, prune_checkpoints, row_name
from pocl_dist.distributed.checkpoint_share import package_versions, write_share
from pocl_dist.distributed.checkpoint_write import _make_room
from pocl_dist.distributed.engine import loss_scale_state, set_loss_scale_state
from pocl_dist.errors import WorkerError
from pocl_dist.files import atomic_write_json
from pocl_dist.pipeline.save import interval_hint
from tests.ranks import run_ranks

RUN = "digest of the run"


def _save_of(folder: Path, step: int, run_digest: str = RUN) -> Save:
    """Returns a save of two ranks, both files written, that waits for its commit."""
    temporary = folder / f".tmp-step-{step:08d}-token"
    temporary.mkdir(parents=True)
    for index in range(2):
        generator = torch.Generator().manual_seed(10 * step + index)
        share = {f"weights.{index}": torch.randn(5, 7, generator=generator)}
        row = write_share(share, temporary / share_name(index))
        atomic_write_json(temporary / row_name(index), row)
    manifest = {
        "format": FORMAT, "step": step, "digests": {"run": run_digest}, "state": {"step": step},
        "adam_step": step, "loss_scale": None, "versions": package_versions(),
    }  # fmt: skip
    return Save(step, temporary, {}, manifest, 1000, 0.0)


def _commit(folder: Path, step: int, run_digest: str = RUN) -> Path:
    commit(_save_of(folder, step, run_digest), 2, lambda: None)
    return step_folder(folder, step)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Returns the folder of a committed checkpoint of step 2; that of step 1 lies beside it."""
    _commit(tmp_path, 1)
    return _commit(tmp_path, 2)


def test_a_commit_leaves_the_listed_files_a_manifest_and_its_seal_and_reads_back(
    checkpoint: Path,
) -> None:
    names = sorted(path.name for path in checkpoint.iterdir())
    assert names == [MANIFEST, SEAL, share_name(0), share_name(1)]
    assert damage_of(checkpoint, RUN) == ""
    found = dict(read_checkpoint(checkpoint, RUN).tensors("weights"))
    expected = torch.randn(5, 7, generator=torch.Generator().manual_seed(21))
    assert torch.equal(found["1"], expected)
    assert not list(checkpoint.parent.glob(".tmp-*"))


def test_every_length_but_the_whole_is_damage_and_names_the_file(checkpoint: Path) -> None:
    for file in sorted(checkpoint.iterdir()):
        content = file.read_bytes()
        for length in (0, 1, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:length])
            assert checkpoint.name in damage_of(checkpoint, RUN)
        file.write_bytes(content)
        file.unlink()
        assert file.name in damage_of(checkpoint, RUN)
        file.write_bytes(content)
    assert damage_of(checkpoint, RUN) == ""


def test_every_one_of_400_flipped_bits_is_found_also_in_the_manifest_and_its_seal(
    checkpoint: Path,
) -> None:
    draw = random.Random(0)
    for file in sorted(checkpoint.iterdir()):
        content = file.read_bytes()
        for _ in range(100):
            changed = bytearray(content)
            changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            file.write_bytes(changed)
            assert checkpoint.name in damage_of(checkpoint, RUN)
        file.write_bytes(content)


def test_two_ranks_files_that_changed_places_are_damage(checkpoint: Path) -> None:
    first, second = (checkpoint / share_name(index) for index in range(2))
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    assert share_name(0) in damage_of(checkpoint, RUN, turn=0, num_turns=2)
    assert share_name(1) in damage_of(checkpoint, RUN, turn=1, num_turns=2)


def _resealed(folder: Path, change: Callable[[dict], object]) -> None:
    """Changes the manifest as a writer of something else would have: its seal fits."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / SEAL).write_text(seal_of((folder / MANIFEST).read_bytes()))


KEYS = ("format", "step", "digests", "state", "adam_step", "loss_scale", "files")


@pytest.mark.parametrize("key", KEYS)
def test_a_manifest_that_lacks_a_key_is_damage(checkpoint: Path, key: str) -> None:
    _resealed(checkpoint, lambda manifest: manifest.pop(key))
    assert MANIFEST in damage_of(checkpoint, RUN)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda manifest: manifest.update(format=1), "of format 1"),
        (lambda manifest: manifest.update(files=7), "lacks a key or has one of another type"),
        (lambda manifest: manifest["files"][0].update(path="../../x"), "'../../x'"),
        (lambda manifest: manifest["files"][0].pop("sha256"), "sha256"),
    ],
)
def test_a_manifest_of_another_make_is_damage(
    checkpoint: Path, change: Callable[[dict], object], words: str
) -> None:
    _resealed(checkpoint, change)
    assert words in damage_of(checkpoint, RUN)


def test_the_manifest_of_another_step_or_run_is_damage_though_all_its_hashes_fit(
    checkpoint: Path,
) -> None:
    other = step_folder(checkpoint.parent, 1)
    shutil.rmtree(checkpoint)
    shutil.copytree(other, checkpoint)
    assert "belongs to step 1" in damage_of(checkpoint, RUN)
    assert "another config, data, model or plan" in damage_of(other, "another digest")


def test_a_commit_that_the_fence_refuses_leaves_nothing_under_the_final_name(
    tmp_path: Path,
) -> None:
    def refuse() -> None:
        raise WorkerError("attempt 2 has it")

    with pytest.raises(WorkerError):
        commit(_save_of(tmp_path, 1), 2, refuse)
    assert committed_steps(tmp_path) == []


def test_a_step_that_is_saved_again_replaces_the_one_there(tmp_path: Path) -> None:
    _commit(tmp_path, 1, "before")
    assert damage_of(_commit(tmp_path, 1), RUN) == ""


def test_no_folder_is_made_where_the_space_is_not_enough(tmp_path: Path) -> None:
    problem = _make_room(tmp_path / ".tmp-step", 10**18)
    assert f"checkpoint needs {10**18} bytes, " in problem["text"]
    assert f"are free at {tmp_path}" in problem["text"]
    assert problem["kind"] == "StorageError"
    assert list(tmp_path.iterdir()) == []


def test_the_newest_and_the_asked_for_are_kept_and_other_names_left_alone(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        _commit(tmp_path, step)
    (tmp_path / "step-notes").mkdir()
    prune_checkpoints(tmp_path, keep_last=1, keep_steps={2})
    assert committed_steps(tmp_path) == [2, 4]
    assert sorted(path.name for path in tmp_path.iterdir())[-1] == "step-notes"


def _damages(folder: Path) -> Iterator[Callable[[], object]]:
    """Yields ways to damage a checkpoint."""
    for file in sorted(folder.iterdir()):
        yield file.unlink
        yield lambda file=file: file.write_bytes(b"")
        yield lambda file=file: file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    yield lambda: _resealed(folder, lambda manifest: manifest.update(step=1))


def _fall_back(folder: str) -> list[tuple[int, bool]]:
    """Returns, for each damage, the step that is used and whether the damaged one was set aside."""
    from pocl_dist.distributed.checkpoint import find_checkpoint
    from pocl_dist.distributed.process_group import join_process_group

    rank, root, found = join_process_group(60), Path(folder), []
    newest = step_folder(root, 2)
    shutil.copytree(newest, root / "copy")
    for number in range(len(list(_damages(newest)))):
        list(_damages(newest))[number]()
        checkpoint = find_checkpoint(root, rank, RUN)
        assert checkpoint is not None
        name = "bad-step-00000002" if number == 0 else f"bad-step-00000002-{number + 1}"
        found.append((checkpoint.step, (root / name).is_dir()))
        shutil.copytree(root / "copy", newest)
    return found


def test_after_every_kind_of_damage_the_checkpoint_before_is_used(checkpoint: Path) -> None:
    (found,) = run_ranks(_fall_back, 1, str(checkpoint.parent))
    assert found == [(1, True)] * 13


def test_the_loss_scale_of_fp16_and_its_counters_are_read_and_set() -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    def engine(scale: float) -> SimpleNamespace:
        scaler = DynamicLossScaler(scale, 1000, 1.0, 2, False)
        optimizer = SimpleNamespace(loss_scaler=scaler)
        return SimpleNamespace(optimizer=optimizer, fp16_enabled=lambda: True)

    first, second = engine(2.0**16), engine(2.0**16)
    first.optimizer.loss_scaler.cur_hysteresis = 1
    for _ in range(1500):  # grows once on the way
        first.optimizer.loss_scaler.update_scale(False)
    assert first.optimizer.loss_scaler.cur_scale == 2.0**17
    set_loss_scale_state(second, json.loads(json.dumps(loss_scale_state(first))))
    assert vars(second.optimizer.loss_scaler) == vars(first.optimizer.loss_scaler)


def test_the_suggested_interval_loses_less_than_a_longer_and_a_shorter_one() -> None:
    minutes = float(interval_hint(2.0, 24.0).split("one every ")[1].split()[0])

    def lost(seconds: float) -> float:
        return 2.0 / seconds + seconds / (2.0 * 24 * 3600)

    assert math.isclose(minutes * 60, math.sqrt(2 * 2.0 * 24 * 3600), rel_tol=0.01)
    assert lost(minutes * 60) < min(lost(minutes * 60 * 1.2), lost(minutes * 60 / 1.2))
