"""A run directory of another program or version is refused before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pocl_dist.errors import ConfigError, MismatchError
from pocl_dist.files import atomic_write_text, digest_of, json_text, read_json
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.pipeline.run_format import check_run_directory
from pocl_dist.versions import versions
from tests.test_bad_input import Command, command, config  # noqa: F401  (fixtures)


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def _status(root: Path, **changed: object) -> None:
    """Writes a status file that is whole in itself, with other values."""
    run = RunDirectory(root)
    run.write_status("done", 0, "plan")
    value = {**read_json(run.status), **changed}
    del value["digest"]
    atomic_write_text(run.status, json_text({**value, "digest": digest_of(value)}))  # type: ignore[arg-type]


def _damage(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"done"', b'"dune"'))


REFUSED: dict[str, Callable[[Path], object]] = {
    "it holds holiday.jpg, notes.txt, but neither status.json": lambda root: (
        atomic_write_text(root / "notes.txt", "x"),
        atomic_write_text(root / "holiday.jpg", "x"),
    ),
    "it holds 1, 2, 3 and more": lambda root: [
        atomic_write_text(root / name, "x") for name in "12345"
    ],
    "status.json: written by another program or version": lambda root: atomic_write_text(
        root / "status.json", '{"state": "ok"}'
    ),
    "its format is 7, that of this version 2": lambda root: _status(root, format=7),
    "status.json is not readable JSON": lambda root: atomic_write_text(root / "status.json", "no"),
    "status.json holds no JSON object": lambda root: atomic_write_text(root / "status.json", "[]"),
    "changed after it was written": lambda root: (_status(root), _damage(root / "status.json")),
    "manifest.json: written by another program": lambda root: atomic_write_text(
        root / "manifest.json", '{"format": 1, "files": []}'
    ),
    "Is a directory": lambda root: (root / "status.json").mkdir(parents=True),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_folder_of_another_program_or_version_is_78_and_nothing_is_written(
    command: Command,  # noqa: F811
    config: Path,  # noqa: F811
    reason: str,
) -> None:
    root = config.parent / "run"
    REFUSED[reason](root)
    before = snapshot(root)
    outcome = command("plan", config)
    assert (outcome.code, reason in outcome.message) == (78, True), outcome
    assert snapshot(root) == before


def test_an_empty_folder_and_one_with_requests_of_a_person_are_fine(
    command: Command,  # noqa: F811
    config: Path,  # noqa: F811
) -> None:
    root = config.parent / "run"
    root.mkdir()
    assert command("plan", config).code == 0
    (root / "notes.txt").write_text("mine")  # in a run directory that is known to be one
    assert command("plan", config).code == 0


def test_a_run_dir_that_is_no_folder_or_holds_the_scratch_is_64(
    command: Command,  # noqa: F811
    config: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = config.parent / "file"
    file.write_text("x")
    for path in (file, file / "below"):
        outcome = command("plan", config, f"run_dir={path}")
        assert outcome.code == 64 and f"run_dir: {path}" in outcome.message
    for name in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR"):
        with monkeypatch.context() as context:
            context.setenv(name, str(config.parent / "run" / "scratch"))
            outcome = command("plan", config)
        assert outcome.code == 64 and f"${name}" in outcome.message
    assert not (config.parent / "run").exists()


def test_versions_name_the_code_and_change_with_it() -> None:
    found = versions()
    assert set(found) >= {"pocl_dist", "code sha256", "torch", "deepspeed", "transformers", "ray"}
    assert len(str(found["code sha256"])) == 64


def test_other_code_is_a_warning_and_with_strict_versions_78(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _status(tmp_path, versions={**versions(), "code sha256": "f" * 64, "torch": "1.0"})
    check_run_directory(tmp_path, is_strict=False)
    said = capsys.readouterr().err
    assert "code sha256 ffffffffffff -> " in said and "torch 1.0 -> " in said
    with pytest.raises(MismatchError, match=r"resume\.strict_versions is true"):
        check_run_directory(tmp_path, is_strict=True)
    RunDirectory(tmp_path).write_status("done", 0, "plan")
    check_run_directory(tmp_path, is_strict=True)
    assert capsys.readouterr().err == ""


def test_strict_versions_on_the_command_line_leave_the_run_as_it_is(
    command: Command,  # noqa: F811
    config: Path,  # noqa: F811
) -> None:
    assert command("plan", config).code == 0
    root = config.parent / "run"
    value = json.loads((root / "status.json").read_text())
    _status(root, versions={**value["versions"], "ray": "0.1"})
    before = snapshot(root)
    outcome = command("plan", config, "resume.strict_versions=true")
    assert outcome.code == 78 and "ray 0.1 -> " in outcome.message
    assert snapshot(root) == before
    outcome = command("plan", config)
    assert outcome.code == 0 and "ray 0.1 -> " in outcome.message


def test_a_relative_run_dir_is_looked_at_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "a"))
    with pytest.raises(ConfigError, match="TMPDIR"):
        check_run_directory(Path("a"), is_strict=False)
    check_run_directory(Path("b"), is_strict=False)
