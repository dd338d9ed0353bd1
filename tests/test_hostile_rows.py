"""Hostile rows: every file is read, or refused with file and row; a strict parser agrees.

Lists of single cases are in test_sources.py; here files are made at random.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from pocl_dist.data.row_form import MAX_ROW_BYTES
from pocl_dist.data.sources import read_rows
from pocl_dist.errors import DataError
from tests.hostile import hostile_files, hostile_rows

RELAXED = {
    "deadline": None, "derandomize": True, "database": None,
    "suppress_health_check": list(HealthCheck),
}  # fmt: skip


def _is_text(value: object, can_be_empty: bool = False) -> bool:
    """Returns whether a value is text that UTF-8 can hold, without NUL, and not blank."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return can_be_empty or value.strip() != ""


def _is_response(value: object) -> bool:
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(map(_is_text, texts))


class _Repeated(ValueError):
    """A key stands in an object twice."""


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise _Repeated
    return dict(pairs)


def _is_good(line: bytes) -> bool:
    """The oracle: what the README says of a row, written down again without looking."""
    try:
        row = json.loads(line.decode("utf-8", "strict"), object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return False
    if not isinstance(row, dict):
        return False
    name = row.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        return False
    if name is not None and not _is_text(str(name)):
        return False
    if "messages" in row:
        turns = row["messages"]
        return (
            isinstance(turns, list)
            and len(turns) >= 2
            and all(isinstance(t, dict) for t in turns)
            and all(_is_text(t.get(key)) for t in turns for key in ("role", "content"))
            and [t["role"] for t in turns[-2:]] == ["user", "assistant"]
        )
    if "instruction" in row:
        has_context = "input" not in row or _is_text(row["input"], can_be_empty=True)
        return has_context and _is_text(row["instruction"]) and _is_response(row.get("output"))
    return _is_text(row.get("prompt")) and _is_response(row.get("response"))


def check_file(path: Path, content: bytes) -> None:
    """Reads a hostile file under both policies; left out is what the oracle refuses."""
    path.write_bytes(content)
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    good, bad, ids = 0, [], set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = None
        if is_good := _is_good(line.rstrip(b"\r")):
            name = json.loads(line).get("id")
        if is_good and (name is None or str(name) not in ids):
            good += 1
            ids |= set() if name is None else {str(name)}
        else:
            bad.append(number)
    try:
        rows = read_rows(str(path), "data.train", on_bad_row="quarantine")
    except DataError as error:
        assert good == 0 and str(error) == f"{path}: no row left ({len(bad)} bad rows)"
    else:
        assert [row.row for row in rows.bad_rows] == bad and len(rows.examples) == good
        assert all(row.reason.isprintable() and len(row.reason) < 300 for row in rows.bad_rows)
    if bad:
        with pytest.raises(DataError, match=f"^{re.escape(str(path))}:{bad[0]}: ") as caught:
            read_rows(str(path), "data.train")
        assert str(caught.value).isprintable()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile") / "rows.jsonl"


@settings(max_examples=150, **RELAXED)  # type: ignore[arg-type]
@given(content=hostile_rows)
def test_hostile_rows_are_refused_by_row_and_nothing_else_is(file: Path, content: bytes) -> None:
    check_file(file, content)


@pytest.mark.slow
@settings(max_examples=2000, **RELAXED)  # type: ignore[arg-type]
@given(content=hostile_rows)
def test_two_thousand_hostile_files_of_rows(file: Path, content: bytes) -> None:
    check_file(file, content)


def test_files_without_hypothesis_are_repeatable_and_refused_likewise(file: Path) -> None:
    contents = list(hostile_files(seed=7, count=100))
    assert contents == list(hostile_files(seed=7, count=100)) != list(hostile_files(8, 100))
    for content in contents:
        check_file(file, content)


def test_an_id_that_is_nested_as_deeply_as_json_allows_is_a_bad_row(file: Path) -> None:
    for depth in range(
        900, 1000, 7
    ):  # somewhere there parsing works and showing the value does not
        nested = b"[" * depth + b"]" * depth
        file.write_bytes(b'{"id":' + nested + b',"prompt":"a","response":"b"}')
        with pytest.raises(DataError, match=r"rows\.jsonl:1: "):
            read_rows(str(file), "data.train")


def test_a_line_of_a_gibibyte_is_skipped_without_being_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "sparse.jsonl"
    with path.open("wb") as handle:
        handle.truncate(1 << 30)  # takes no space on the disk
        handle.seek(0, os.SEEK_END)
        handle.write(b'\n{"instruction":"a","output":"b"}')
    code = (
        "import resource, sys\nfrom pocl_dist.data.sources import read_rows\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "rows = read_rows(sys.argv[1], 'data.train', on_bad_row='quarantine')\n"
        "print(*rows.bad_rows)\nprint(len(rows.examples))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    words = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    message, num_rows, kilobytes = done.stdout.splitlines()
    assert message == f"{path}:1: longer than {MAX_ROW_BYTES} bytes"
    assert num_rows == "1" and int(kilobytes) < 64 * 1024
