"""The run directory: its status, and the records of what results were made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pocl_dist.errors import (
    EXIT_CODES,
    DataError,
    ExitCode,
    MismatchError,
    MissingInputError,
)
from pocl_dist.files import atomic_write_json, atomic_write_text
from pocl_dist.pipeline.manifest import MANIFEST_NAME, SEAL_NAME, write_manifest
from pocl_dist.pipeline.run_directory import (
    RunDirectory,
    check_made_from,
    kept_if_refused,
)
from pocl_dist.pipeline.status_file import outcome, read_status


@pytest.mark.parametrize("row", EXIT_CODES, ids=lambda row: row.name)
def test_the_status_says_whether_to_submit_the_job_again(tmp_path: Path, row: ExitCode) -> None:
    run = RunDirectory(tmp_path)
    run.write_status("failed", row.code, "plan", "because")
    status = json.loads(run.status.read_text())
    assert status["retryable"] == row.is_retryable == (row.code in (69, 71, 75))
    assert (status["exit_code"], status["phase"], status["reason"]) == (row.code, "plan", "because")


def test_the_seconds_of_a_step_add_up_over_attempts(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for step, seconds in (("measure", 1.5), ("distill", 4.0), ("measure", 2.0)):
        run.add_seconds(step, seconds)
    assert json.loads(run.timings.read_text()) == {"measure": 3.5, "distill": 4.0}


def test_a_record_of_other_inputs_is_a_mismatch_that_names_every_key(tmp_path: Path) -> None:
    path = tmp_path / "inputs.json"
    assert not check_made_from(path, {"seed": 1})
    atomic_write_json(path, {"seed": 1, "loss.name": "forward_kl", "gone": 3})
    assert check_made_from(path, {"seed": 1, "loss.name": "forward_kl", "gone": 3})
    with pytest.raises(MismatchError) as caught:
        check_made_from(path, {"seed": 2, "loss.name": "forward_kl", "new": None})
    lines = str(caught.value).splitlines()
    assert [line.strip().partition(":")[0] for line in lines[1:-1]] == ["gone", "seed"]
    assert "seed: it was made with 1, now 2" in str(caught.value)
    path.write_text("{")
    with pytest.raises(MismatchError, match=r"inputs\.json is not readable JSON"):
        check_made_from(path, {})


def _finished_run(root: Path) -> None:
    for name in ("config.yaml", "timings.json", "plan.json"):
        atomic_write_text(root / name, f"{name} of the run")
    write_manifest(root)


def test_a_refused_command_leaves_a_finished_run_sealed(tmp_path: Path) -> None:
    _finished_run(tmp_path)
    names = ("config.yaml", "timings.json", MANIFEST_NAME, SEAL_NAME)
    before = {name: (tmp_path / name).read_bytes() for name in names}
    for error in (MismatchError("other inputs"), DataError("bad row")):
        with pytest.raises(type(error)), kept_if_refused(tmp_path):
            atomic_write_text(tmp_path / "config.yaml", "another")
            write_manifest(tmp_path)
            atomic_write_text(tmp_path / "timings.json", "longer")
            raise error
        assert {name: (tmp_path / name).read_bytes() for name in names} == before


def test_a_command_that_worked_or_was_interrupted_keeps_what_it_wrote(tmp_path: Path) -> None:
    _finished_run(tmp_path)
    with kept_if_refused(tmp_path):
        atomic_write_text(tmp_path / "config.yaml", "second")
    with pytest.raises(KeyboardInterrupt), kept_if_refused(tmp_path):
        atomic_write_text(tmp_path / "timings.json", "longer")
        raise KeyboardInterrupt
    assert (tmp_path / "config.yaml").read_text() == "second"
    assert (tmp_path / "timings.json").read_text() == "longer"


def _status(tmp_path: Path) -> Path:
    run = RunDirectory(tmp_path)
    run.write_status("failed", 74, "plan", "disk full, é")
    return run.status


def test_a_status_is_read_back_and_its_exit_code_is_the_outcome(tmp_path: Path) -> None:
    path = _status(tmp_path)
    assert read_status(path)["reason"] == "disk full, é"
    assert outcome(tmp_path) == 74
    path.unlink()
    with pytest.raises(MissingInputError, match=r"status\.json does not exist"):
        outcome(tmp_path)


def test_one_flipped_bit_anywhere_in_the_status_is_found(tmp_path: Path) -> None:
    path = _status(tmp_path)
    content = path.read_bytes()
    for position in range(len(content)):
        for bit in (0, 5):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            path.write_bytes(bytes(flipped))
            with pytest.raises(MismatchError, match=r"status\.json: "):
                read_status(path)
    for more in (b"\n", b" "):  # the same values, but not the same bytes
        path.write_bytes(content + more)
        with pytest.raises(MismatchError, match="its digest differs"):
            read_status(path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff", b"null", b'{"exit_code": 0}', b"{}"]
)
def test_a_status_that_is_damaged_or_of_another_program_is_a_clear_error(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "status.json").write_bytes(content)
    with pytest.raises(MismatchError, match=r"status\.json: .*pocl_dist"):
        outcome(tmp_path)
    (tmp_path / "status.json").unlink()
    (tmp_path / "status.json").mkdir()
    with pytest.raises(MismatchError, match="Is a directory"):
        outcome(tmp_path)
