"""Names in files stay in the folder; text of others reaches no terminal as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl_dist.cli import describe, main
from pocl_dist.errors import DataError, RefusedError
from pocl_dist.files import atomic_write_json, digest_of
from pocl_dist.guards import LONGEST_LINE, inside, printable, shown
from pocl_dist.models.sources import ModelFolder
from pocl_dist.pipeline.inputs import _find_once
from pocl_dist.pipeline.plan_files import read_plan
from pocl_dist.pipeline.run_directory import RunDirectory
from tests.hostile import NASTY
from tests.test_hostile_rows import RELAXED
from tests.tiny import write_rows

LEAVING = (
    "../outside", "/etc/passwd", "a/../../outside", "link", "link/passwd", "a\0b", "a\nb",
    "x" * 300, "", ".." , "\x1b[2J", "a/" * 40 + "../" * 41 + "b",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "outside").write_text("private")
    (tmp_path / "home" / "link").symlink_to("/etc")
    return tmp_path / "home"


@pytest.mark.parametrize("name", LEAVING)
def test_a_name_that_leaves_its_folder_is_refused_in_one_clean_line(
    folder: Path, name: str
) -> None:
    with pytest.raises(RefusedError, match=r"^plan\.json: the name .* leaves") as caught:
        inside(folder, name, "plan.json")
    assert caught.value.exit_code == 77
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["a.parquet", "deep/er/b", "not there", "..a", "é.json", "a..b"])
def test_a_plain_name_is_the_path_in_the_folder(folder: Path, name: str) -> None:
    assert inside(folder, name) == folder / name


def test_a_folder_that_is_itself_a_link_is_the_users_choice(folder: Path) -> None:
    (folder.parent / "alias").symlink_to(folder)
    assert inside(folder.parent / "alias", "a") == folder.parent / "alias" / "a"


@settings(max_examples=100, **RELAXED)  # type: ignore[arg-type]
@given(
    name=st.one_of(
        st.text(max_size=30), st.lists(st.sampled_from(["..", "a", "/", "~", "."])).map("/".join)
    )
)
def test_whatever_the_name_the_path_never_leaves(name: str) -> None:
    home = Path("/nowhere/home")
    try:
        path = inside(home, name)
    except RefusedError:
        return
    assert path.resolve().is_relative_to(home) and "\0" not in name


# --- those who read names from files


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a\0b", "link/passwd"])
def test_a_plan_whose_ranking_lies_elsewhere_is_refused(folder: Path, name: str) -> None:
    value = {
        "stages": [],
        "inputs": {},
        "ranking_file": name,
        "ranking_sha256": "",
        "num_ranked": 1,
    }
    atomic_write_json(folder / "plan.json", {**value, "digest": digest_of(value)})  # type: ignore[arg-type]
    with pytest.raises(RefusedError, match=r"plan\.json: ranking_file: the name"):
        read_plan(folder / "plan.json")


@pytest.mark.parametrize("commit", ["../../x", "main", "", None, "0" * 39 + "\n"])
def test_a_recorded_commit_that_is_none_is_refused(folder: Path, commit: str | None) -> None:
    entry = {"path": "me/mine", "revision": None, "commit": commit}
    atomic_write_json(folder / "models.json", {"models.teacher.path": entry})

    def find(path: str, key: str, revision: str | None) -> ModelFolder:
        raise AssertionError(f"{revision} was looked for")

    with pytest.raises(RefusedError, match=r"models\.json: .* has the commit"):
        _find_once(RunDirectory(folder), "models.teacher.path", "me/mine", None, find)


# --- text


@settings(max_examples=100, **RELAXED)  # type: ignore[arg-type]
@given(text=st.one_of(st.text(st.characters(exclude_categories=())), st.sampled_from(NASTY)))
def test_text_for_a_terminal_has_no_control_character_and_loses_nothing_else(text: str) -> None:
    clean = printable(text)
    assert all(line.isprintable() for line in clean.split("\n"))
    assert clean.count("\n") == text.count("\n")
    assert printable(clean) == clean
    assert clean == text or not all(line.isprintable() for line in text.split("\n"))
    assert shown(text).isprintable() and len(shown(text)) <= 83


def test_values_and_lines_are_cut() -> None:
    assert len(shown("x" * 10_000_000)) == 83
    assert len(printable("x" * 10_000_000 + "\nb")) == LONGEST_LINE + len("...\nb")
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    assert shown(deep) == "a deeply nested list"


def test_no_error_of_any_kind_reaches_the_terminal_unescaped() -> None:
    for error in (DataError("row \x1b[2J\r"), ValueError("\x9b31m"), OSError(28, "x", "a\x1b")):
        code, reason = describe(error)
        assert code in (65, 70, 74) and reason.isprintable()


def test_a_hostile_file_name_and_id_come_out_escaped_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POCL_DIST_PARENT", "")
    monkeypatch.chdir(tmp_path)
    name = "rows\x1b[2J.jsonl"
    rows = write_rows(tmp_path / name, 2).read_bytes()
    (tmp_path / name).write_bytes(rows + json.dumps({"id": "\x9b\r" * 3000}).encode())
    words = [
        "run_dir=run",
        "models.teacher=",
        "models.student.path=s",
        f"data.train={json.dumps(name)}",
    ]
    with pytest.raises(SystemExit) as caught:
        main(["plan", *words])
    captured = capfd.readouterr()
    assert caught.value.code == 65
    for line in (captured.out + captured.err).splitlines():
        assert line.isprintable() and len(line) < 2100
