"""A full or failing disk, in every writer: exit code 74, path and bytes; the rest is intact."""

from __future__ import annotations

import errno
import os
import pickle
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pocl_dist import failpoints
from pocl_dist.config import Config
from pocl_dist.errors import WorkerError
from pocl_dist.files import (
    WriteError,
    atomic_write_text,
    explain_storage_error,
    guarded,
    new_folder,
    read_json_lines,
    require_free,
    writing,
)
from pocl_dist.run_log import MetricsLog
from pocl_dist.trackers.sender import Trackers
from tests.test_bad_input import Command, command, config  # noqa: F401  (fixtures)


def test_the_system_s_error_is_found_however_a_library_tells_it(tmp_path: Path) -> None:
    told = [
        OSError(errno.ENOSPC, "x"),
        OSError(errno.EDQUOT, "x", "/elsewhere"),
        RuntimeError('Error while serializing: I/O error: No space left (os error 28)'),
        Exception("[Errno 30] Read-only file system: 'y'"),
    ]  # fmt: skip
    numbers = []
    for error in told:
        with pytest.raises(WriteError) as caught, writing(tmp_path / "a", 7):
            raise error
        assert caught.value.filename == str(tmp_path / "a")
        assert (caught.value.num_bytes, caught.value.__cause__) == (7, error)
        numbers.append(caught.value.errno)
    assert numbers == [errno.ENOSPC, errno.EDQUOT, errno.ENOSPC, errno.EROFS]
    with pytest.raises(KeyError), writing(tmp_path):
        raise KeyError("not the disk")


def test_the_message_has_path_bytes_needed_and_bytes_free(tmp_path: Path) -> None:
    with pytest.raises(WriteError) as caught:
        require_free(tmp_path / "export", 1 << 62)
    line = explain_storage_error(caught.value)
    assert line is not None
    assert line.startswith(f"disk full while writing {tmp_path}/export: {1 << 62} bytes needed, ")
    assert line.endswith(" bytes free")
    sent = pickle.loads(pickle.dumps(caught.value))  # from an actor to the driver
    assert explain_storage_error(sent) is not None and sent.num_bytes == 1 << 62


def test_a_folder_takes_its_name_when_it_is_whole_and_else_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "new" / "export"
    with new_folder(target) as folder:
        atomic_write_text(folder / "a", "first")
        assert not target.exists()
    with pytest.raises(ValueError, match="half"), new_folder(target) as folder:
        (folder / "a").write_text("second")
        raise ValueError("half")
    assert (target / "a").read_text() == "first"
    with new_folder(target, keeps_existing=True) as folder:
        (folder / "a").write_text("third")
    assert (target / "a").read_text() == "first"
    assert [path.name for path in target.parent.iterdir()] == ["export"]


def test_a_writer_that_is_fenced_off_commits_neither_file_nor_folder(tmp_path: Path) -> None:
    def fenced() -> None:
        raise WorkerError("this is attempt 1, and attempt 2 has it")

    atomic_write_text(tmp_path / "run" / "plan.json", "old")
    with guarded(tmp_path / "run", fenced):
        with pytest.raises(WorkerError):
            atomic_write_text(tmp_path / "run" / "plan.json", "new")
        with pytest.raises(WorkerError), new_folder(tmp_path / "run" / "export"):
            pass
        atomic_write_text(tmp_path / "cache" / "model", "new")  # not in the run directory
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["plan.json"]
    assert (tmp_path / "run" / "plan.json").read_text() == "old"


# --- the whole command, its every write in turn


@pytest.mark.parametrize("place", ["atomic_write.open", "atomic_write.before_rename"])
def test_a_full_disk_at_any_write_of_a_command_is_74_and_the_command_goes_on_later(
    command: Command,  # noqa: F811
    config: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    run_dir, number, is_over = config.parent / "run", 0, False
    while not is_over:
        number += 1
        failpoints._num_passed.clear()
        with monkeypatch.context() as context:
            context.setenv(failpoints.VARIABLE, f"{place}=enospc@{number}")
            outcome = command("plan", config)
        is_over = outcome.code == 0
        if not is_over:
            assert outcome.code == 74
            assert f"disk full while writing {run_dir}/" in outcome.message
            assert "bytes needed, " in outcome.message and "bytes free" in outcome.message
            assert not list(run_dir.rglob(".tmp-*")) and not (run_dir / "lock").exists()
            assert command("plan", config).code == 0
            assert command("verify", run_dir).code == 0
            (run_dir / "plan.json").unlink()  # so that the next round writes it again
    assert number > 6


def test_files_of_a_command_are_its_user_s_alone(
    command: Command,  # noqa: F811
    config: Path,  # noqa: F811
) -> None:
    before = os.umask(0o022)
    try:
        assert command("plan", config).code == 0
    finally:
        os.umask(before)
    run_dir = config.parent / "run"
    modes = {path.stat().st_mode & 0o777 for path in run_dir.rglob("*") if path.is_file()}
    assert (run_dir.stat().st_mode & 0o777, modes) == (0o700, {0o600})


# --- a disk that is really full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Returns a file system of 256 KiB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(line, capture_output=True).returncode != 0:
        pytest.skip("needs root and the right to mount: the full disk is NOT tested here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _fill(folder: Path) -> Path:
    path = folder / "filler"
    with path.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(b"x" * 4096)
        except OSError:
            return path


def test_a_command_on_a_full_disk_is_74_keeps_what_is_there_and_goes_on_with_space(
    command: Command,  # noqa: F811
    config: Path,  # noqa: F811
    small_disk: Path,
) -> None:
    words = ("plan", config, f"run_dir={small_disk / 'run'}")
    assert command(*words).code == 0
    (small_disk / "run" / "plan.json").unlink()
    filler = _fill(small_disk)
    os.truncate(
        filler, filler.stat().st_size - 4096
    )  # the lock finds room, what comes next does not
    outcome = command(*words)
    assert outcome.code == 74
    assert f"disk full while writing {small_disk}/run/" in outcome.message
    assert re.search(r" \d+ bytes needed, \d+ bytes free", outcome.message)
    assert "status.json was not written" in outcome.message
    filler.unlink()
    assert command(*words).code == 0
    assert command("verify", small_disk / "run").code == 0


def test_every_other_writer_names_the_full_disk_and_leaves_nothing(small_disk: Path) -> None:
    log = MetricsLog(small_disk / "metrics.jsonl", -1)
    log.write({"kind": "step", "step": 1, "loss": 0.5})
    with pytest.raises(WriteError) as caught, new_folder(small_disk / "export") as folder:
        save_file({"weight": torch.zeros(1 << 17)}, folder / "model.safetensors")  # 512 KiB
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(small_disk / "export"))
    assert [path.name for path in small_disk.iterdir()] == ["metrics.jsonl"]
    _fill(small_disk)
    with pytest.raises(WriteError) as caught:
        for step in range(2, 400):
            log.write({"kind": "step", "step": step, "loss": 0.5})
    assert caught.value.filename == str(small_disk / "metrics.jsonl")
    log.close()
    rows = read_json_lines(small_disk / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))


def test_a_tracker_on_a_full_disk_is_warned_of_once_and_ends_nothing(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # TensorBoard's thread ends by it
    tracked = Config.model_validate(
        {
            "run_dir": str(small_disk),
            "models": {"student": {"path": "s"}, "teacher": None},
            "data": {"train": "t"},
            "log": {"trackers": ["tensorboard"]},
        }
    )
    trackers = Trackers(tracked, small_disk, -1, {})
    deadline = time.monotonic() + 60
    while not (small_disk / "trackers" / "tensorboard.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    _fill(small_disk)
    for step in range(2000):
        trackers.send({"kind": "step", "step": step, "loss": 0.5})
    trackers.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("warning: log.trackers: tensorboard failed")
