"""verify: every change of a run directory is found and named, and what was sealed anew as well."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pocl_dist.config import load_config
from pocl_dist.files import atomic_write_json, atomic_write_text, read_json
from pocl_dist.pipeline import difficulty_files
from pocl_dist.pipeline.inputs import read_train
from pocl_dist.pipeline.manifest import (
    MANIFEST_NAME,
    SEAL_NAME,
    list_files,
    remove_leftovers,
    seal_text,
    write_manifest,
)
from pocl_dist.pipeline.plan import make_plan
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.pipeline.run_step import run_step
from pocl_dist.pipeline.verify import find_changes
from pocl_dist.records import DifficultyRecord
from tests.tiny import write_config, write_rows


def planned_run(folder: Path, ordering: str = "curriculum") -> Path:
    """Returns a sealed run directory with scores (written here, not measured) and a plan."""
    rows = write_rows(folder / "train.jsonl", 12)
    student = folder / "student"
    curriculum = {"num_stages": 2, "epochs_per_stage": 2, "ordering": ordering}
    path = write_config(folder, None, student, rows, curriculum=curriculum)
    config = load_config([path])
    run = RunDirectory(Path(config.run_dir))
    run.write_config(config)
    if ordering == "curriculum":
        inputs = difficulty_files.config_inputs(config, read_train(config))
        atomic_write_json(run.difficulty / "inputs.json", inputs)
        names = [f"row-{index:03d}" for index in range(12)]
        for number, part in enumerate((names[:6], names[6:])):
            records = [_record(name, place + 10 * number) for place, name in enumerate(part)]
            difficulty_files.write_difficulty(run.difficulty, f"shard-{number:05d}", records, 0)
    run_step("plan", make_plan, config, run)
    run.write_status("done", 0, "plan")
    return run.root


def _record(name: str, place: int) -> DifficultyRecord:
    values = dict.fromkeys(DifficultyRecord.__dataclass_fields__, 0)
    known = {"example_id": name, "rouge_l": place / 7, "cross_entropy": place / 3, "answer": "cat"}
    return DifficultyRecord(**{**values, **known})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planned_run(tmp_path_factory.mktemp("planned"))


@pytest.fixture
def root(planned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(planned, tmp_path / "run"))


def flip_bit(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def test_a_finished_run_has_no_finding_and_only_live_files_are_not_listed(root: Path) -> None:
    assert find_changes(root) == []
    unlisted = {"status.json", MANIFEST_NAME, SEAL_NAME}
    found = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    unlisted |= {name for name in found if name.startswith("rows/")}  # they follow the source
    assert found - set(list_files(root)) == unlisted


def test_one_flipped_bit_in_any_file_is_a_finding_that_names_the_file(root: Path) -> None:
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for position in (0, len(content) // 2, -1):
            flip_bit(path, position)
            findings = "\n".join(find_changes(root))
            assert path.relative_to(root).as_posix() in findings
            path.write_bytes(content)
    assert find_changes(root) == []


def _link_out(root: Path) -> None:
    (root / "secrets").symlink_to("/etc")


def _link_in(root: Path) -> None:
    (root / "again.json").symlink_to(root / "plan.json")


def _folder_for_file(root: Path) -> None:
    (root / "timings.json").unlink()
    (root / "timings.json").mkdir()


def _link_for_file(root: Path) -> None:
    (root / "timings.json").rename(root.parent / "timings.json")
    (root / "timings.json").symlink_to(root.parent / "timings.json")


CHANGES: dict[str, Callable[[Path], object]] = {
    "plan.json: missing": lambda root: (root / "plan.json").unlink(),
    "timings.json: 1 bytes, expected": lambda root: (root / "timings.json").write_text("1"),
    "more.bin: not listed in manifest.json": lambda root: (root / "more.bin").write_text("1"),
    "eval/x/y: not listed": lambda root: atomic_write_text(root / "eval" / "x" / "y", "1"),
    ".tmp-a-1: left half written": lambda root: (root / ".tmp-a-1").write_text("1"),
    "lock: left by a run that was killed": lambda root: _old_lock(root / "lock"),
    "control/stop: a request": lambda root: atomic_write_text(root / "control" / "stop", ""),
    "secrets: a symbolic link that leaves the folder": _link_out,
    "again.json: a symbolic link; it was not": _link_in,
    "pipe: is neither a file nor a folder": lambda root: os.mkfifo(root / "pipe"),
    "timings.json: is no readable file": _folder_for_file,
    "timings.json: a symbolic link that leaves": _link_for_file,
    "status.json: missing": lambda root: (root / "status.json").unlink(),
    "manifest.json: missing": lambda root: (root / MANIFEST_NAME).unlink(),
    "manifest.json.sha256: missing": lambda root: (root / SEAL_NAME).unlink(),
    "manifest.json.sha256: is no seal": lambda root: (root / SEAL_NAME).write_text(""),
    "config.yaml: missing": lambda root: (root / "config.yaml").unlink(),
}


def _old_lock(path: Path) -> None:
    path.write_text("{}")
    os.utime(path, (1.0, 1.0))


@pytest.mark.parametrize("finding", CHANGES)
def test_every_kind_of_change_is_found_and_named(root: Path, finding: str) -> None:
    CHANGES[finding](root)
    findings = find_changes(root)
    assert any(line.startswith(finding) for line in findings), findings


def test_all_findings_are_listed_not_only_the_first(root: Path) -> None:
    flip_bit(root / SEAL_NAME, 0)
    flip_bit(root / "status.json", 5)
    flip_bit(root / "difficulty" / "inputs.json")
    (root / "plan.json").unlink()
    (root / "more.bin").write_text("1")
    named = {line.split(":")[0] for line in find_changes(root)}
    assert named >= {
        SEAL_NAME,
        "status.json",
        "difficulty/inputs.json",
        "plan.json",
        "more.bin",
    } or (
        named >= {MANIFEST_NAME, "status.json", "difficulty/inputs.json", "plan.json", "more.bin"}
    )


@pytest.fixture
def unreadable_root(planned: Path) -> Iterator[Path]:
    """Returns a run directory whose plan.json and difficulty/ this process may not read."""
    folder = Path(tempfile.mkdtemp())  # pytest's own folders can only be entered by their owner
    root = folder / "run"
    shutil.copytree(planned, root)
    for path in [folder, root, *root.rglob("*")]:
        path.chmod(0o755)
    (root / "plan.json").chmod(0o000)
    (root / "difficulty").chmod(0o000)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield root
    finally:
        if is_root:
            os.seteuid(0)
        (root / "difficulty").chmod(0o755)
        shutil.rmtree(folder)


def test_what_cannot_be_read_is_a_finding_and_not_a_crash(unreadable_root: Path) -> None:
    findings = find_changes(unreadable_root)
    assert "plan.json: cannot be read: Permission denied" in findings
    assert any("difficulty: cannot be read: Permission denied" in line for line in findings)


def _seal(root: Path, value: object) -> None:
    atomic_write_text(root / MANIFEST_NAME, json.dumps(value))
    atomic_write_text(root / SEAL_NAME, seal_text(root))


def test_a_manifest_cannot_point_out_of_its_folder(root: Path) -> None:
    value = read_json(root / MANIFEST_NAME)
    paths = ("../x", "/etc/hostname", "a/../../x", "nul\0", "x" * 300)
    rows = [{"path": path, "bytes": 1, "sha256": "x"} for path in paths]
    _seal(root, {**value, "files": [*value["files"], *rows]})  # type: ignore[misc]
    findings = find_changes(root)
    assert [("leaves" in line, "missing" in line) for line in findings] == [
        *[(True, False)] * 3, *[(False, True)] * 2,
    ]  # fmt: skip


@pytest.mark.parametrize("value", [{}, {"files": 3}, {"files": [3]}, {"files": [{"path": "a"}]}])
def test_a_manifest_that_is_none_is_a_finding_and_not_a_crash(root: Path, value: object) -> None:
    _seal(root, value)
    assert "manifest.json: is no manifest" in find_changes(root)


def test_sealing_again_follows_what_changed_and_hashes_nothing_else(root: Path) -> None:
    before = (root / MANIFEST_NAME).read_bytes()
    write_manifest(root)
    assert (root / MANIFEST_NAME).read_bytes() == before
    atomic_write_text(root / "new.txt", "new")
    write_manifest(root)
    assert find_changes(root) == []


def test_a_bit_that_the_disk_loses_between_two_steps_is_not_sealed_as_new_content(
    root: Path,
) -> None:
    path = root / "timings.json"
    found = path.stat()
    flip_bit(path, 3)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    write_manifest(root)
    assert find_changes(root) == ["timings.json: content changed (sha256 differs)"]


def test_what_killed_writers_left_is_removed_and_nothing_else(root: Path) -> None:
    for name in (".tmp-plan.json-1", "checkpoints/.tmp-step-7/a/b", "export/.tmp-x"):
        atomic_write_text(root / name, "half")
    (root / ".tmp-link").symlink_to(root / "difficulty")
    remove_leftovers(root)
    (root / "checkpoints").rmdir()
    (root / "export").rmdir()
    assert find_changes(root) == []


# --- the chain: sealed anew by whoever changed it


def _other_score(root: Path) -> None:
    records = [_record(f"row-{index:03d}", 3 * index) for index in range(6)]
    difficulty_files.write_difficulty(root / "difficulty", "shard-00000", records, 0)


def _edit_json(path: Path, **values: object) -> None:
    atomic_write_json(path, {**read_json(path), **values})


def _other_config(root: Path) -> None:
    path = root / "config.yaml"
    path.write_text(path.read_text().replace("epochs_per_stage: 2.0", "epochs_per_stage: 3.0"))


def _damaged_shard(root: Path) -> None:
    (root / "difficulty" / "shard-00001.parquet").write_bytes(b"PAR1 no more")


RESEALED: dict[str, Callable[[Path], object]] = {
    "plan.json: was made from other scores than those in difficulty/": _other_score,
    "plan.json: cannot be followed: MismatchError": lambda root: _edit_json(
        root / "plan.json", stages=[]
    ),
    "plan.json: curriculum.epochs_per_stage is 2.0, in config.yaml 3.0": _other_config,
    "difficulty/inputs.json: data.template is 'chat', in config.yaml 'short'": lambda root: (
        _edit_json(root / "difficulty" / "inputs.json", **{"data.template": "chat"})
    ),
    "plan.json: data.train sha256 is": lambda root: _edit_json(
        root / "difficulty" / "inputs.json", **{"data.train sha256": "0" * 64}
    ),
    "difficulty/shard-00001.parquet: is not what": _damaged_shard,
    "config.yaml: ": lambda root: (root / "config.yaml").write_text("run_dir: [1, 2"),
    "eval/x/shard-1.json: is not what eval/x/shard-1.json.seal says": lambda root: (
        atomic_write_text(root / "eval" / "x" / "shard-1.json", "{}"),
        atomic_write_json(root / "eval" / "x" / "shard-1.json.seal", {"sha256": "0" * 64}),
    ),
    "difficulty: cannot be followed: ValueError": lambda root: (
        root / "difficulty" / "inputs.json"
    ).write_text("[1]"),
}


@pytest.mark.parametrize("finding", RESEALED)
def test_a_change_that_was_sealed_anew_breaks_the_chain(root: Path, finding: str) -> None:
    RESEALED[finding](root)
    write_manifest(root)
    findings = find_changes(root)
    assert any(line.startswith(finding) for line in findings), findings


def test_a_moved_run_directory_still_verifies(planned: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(planned, tmp_path / "elsewhere" / "moved"))
    assert find_changes(moved) == []
