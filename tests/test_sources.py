"""Rows: every form is read, every bad row is told with file, row and reason."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pocl_dist.data.row_form import MAX_ROW_BYTES
from pocl_dist.data.row_streams import ParquetRows
from pocl_dist.data.sources import Rows, read_rows
from pocl_dist.errors import DataError, MissingInputError
from pocl_dist.records import Example

GOOD = b'{"instruction":"a","output":"b"}'


def read(path: Path, content: bytes, **options: object) -> Rows:
    path.write_bytes(content)
    return read_rows(str(path), "data.train", **options)  # type: ignore[arg-type]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


# --- what is read


def test_every_form_of_a_row_becomes_the_same_kind_of_example(file: Path) -> None:
    turns = [
        ("system", "be kind"),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "again"),
        ("assistant", "b"),
    ]
    rows: list[dict[str, object]] = [
        {"id": "one", "instruction": "i", "input": "context", "output": "o", "topic": 3},
        {"id": 2, "instruction": "i", "output": ["first", "second"]},
        {"id": "three", "prompt": "p", "response": "r", "score": {"x": [1]}},
        {"id": "four", "messages": [{"role": role, "content": text} for role, text in turns]},
        {"id": "five", "prompt": "ignored", "instruction": "i", "input": "", "output": "o"},
    ]
    found = read(file, "\n".join(map(json.dumps, rows)).encode()).examples
    assert found == (
        Example("one", "i", "context", ("o",)),
        Example("2", "i", "", ("first", "second")),
        Example("three", "p", "", ("r",)),
        Example("four", "again", "", ("b",), tuple(turns[:3])),
        Example("five", "i", "", ("o",)),
    )


@pytest.mark.parametrize(
    "content",
    [GOOD + b"\n" + GOOD, b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n \t\n" + GOOD + b"\r\n\n"],
    ids=["plain", "BOM, CRLF and blank lines"],
)
def test_identical_rows_get_their_content_hash_and_a_number(file: Path, content: bytes) -> None:
    ids = [example.example_id for example in read(file, content + b"\n" + GOOD).examples]
    assert ids == ["53bf4c7e9dd72dc8", "53bf4c7e9dd72dc8-2", "53bf4c7e9dd72dc8-3"]


def test_content_ids_are_the_same_in_every_run_and_follow_the_content(file: Path) -> None:
    rows = [{"instruction": f"question {i}", "output": "é"} for i in range(20)]
    lines = [json.dumps(row).encode() for row in rows]
    first = read(file, b"\n".join(lines))
    assert read(file, b"\n".join(lines)) == first
    backwards = read(file, b"\n".join(reversed(lines)))
    assert {e.example_id for e in backwards.examples} == {e.example_id for e in first.examples}
    assert backwards.by_id() == first.by_id()
    assert backwards.digest != first.digest  # order is part of a data set


def test_the_digest_changes_with_any_part_of_any_row(file: Path) -> None:
    row = {"id": "x", "instruction": "i", "input": "c", "output": ["o", "p"]}
    changes: list[dict[str, object]] = [
        {"id": "y"},
        {"instruction": "j"},
        {"input": ""},
        {"output": ["o", "q"]},
    ]
    digests = {
        read(file, json.dumps({**row, **change}).encode()).digest for change in [{}, *changes]
    }
    assert len(digests) == 1 + len(changes)
    assert read(file, json.dumps({**row, "note": "not used"}).encode()).digest in digests


def test_a_limit_reads_the_first_rows_and_never_looks_at_the_others(file: Path) -> None:
    found = read(file, GOOD + b"\n" + GOOD + b"\nnot json\n", limit=2)
    assert len(found.examples) == 2 and found.bad_rows == ()
    assert len(read(file, GOOD, limit=5).examples) == 1


def test_line_separators_inside_a_text_do_not_end_the_row(file: Path) -> None:
    text = "a\x85b\u2028c\x0bd"
    row = json.dumps({"prompt": text, "response": "r"}, ensure_ascii=False).encode()
    assert read(file, row).examples[0].prompt == text


# --- bad rows

BAD_ROWS: dict[str, tuple[bytes, str]] = {
    "not JSON": (
        b"hello",
        "not JSON (one object per line is expected): Expecting value at column 1",
    ),
    "cut off": (
        b'{"instruction":"a","outp',
        "not JSON (one object per line is expected): Unterminated string",
    ),
    "opening bracket of an array": (b"[", "not JSON (one object per line is expected)"),
    "two rows in a line": (GOOD + b"\r" + GOOD, "Extra data at column 34"),
    "not UTF-8": (b'{"instruction":"a\xff","output":"b"}', "not UTF-8 at byte 17 of the row"),
    "UTF-16": ('{"prompt":"a"}'.encode("utf-16"), "not UTF-8 at byte 0 of the row"),
    "zeros": (b"\0" * 40, "not JSON"),
    "array": (b"[1]", "not a JSON object but list"),
    "null": (b"null", "not a JSON object but NoneType"),
    "a key twice": (b'{"instruction":"a","instruction":"b","output":"c"}', "a key is given twice"),
    "NUL": (
        b'{"instruction":"a\\u0000","output":"b"}',
        "'instruction' holds a NUL or half a surrogate pair",
    ),
    "lone surrogate": (
        b'{"instruction":"a","output":"\\ud83d"}',
        "'output' holds a NUL or half a surrogate pair",
    ),
    "surrogate in the id": (
        b'{"id":"\\ud83d","instruction":"a","output":"b"}',
        "'id' holds a NUL or half",
    ),
    "no field": (b'{"q":"a"}', "lacks field 'instruction' (or 'prompt', or 'messages')"),
    "no response": (b'{"prompt":"a"}', "lacks field 'response'"),
    "null response": (b'{"instruction":"a","output":null}', "field 'output' is null"),
    "empty response": (b'{"instruction":"a","output":""}', "field 'output' is empty"),
    "blank response": (b'{"instruction":"a","output":" \\n\\t"}', "field 'output' is empty"),
    "empty prompt": (b'{"instruction":" ","output":"b"}', "field 'instruction' is empty"),
    "number": (b'{"instruction":"a","output":3}', "field 'output' is int, expected text"),
    "NaN": (b'{"instruction":"a","output":NaN}', "field 'output' is float, expected text"),
    "no reference": (b'{"instruction":"a","output":[]}', "field 'output' is an empty list"),
    "reference null": (b'{"instruction":"a","output":["x",null]}', "field 'output' is null"),
    "context of another type": (
        b'{"instruction":"a","input":5,"output":"b"}',
        "field 'input' is int",
    ),
    "id of another type": (
        b'{"id":1.5,"instruction":"a","output":"b"}',
        "field 'id' is 1.5, expected text or a",
    ),
    "id true": (b'{"id":true,"instruction":"a","output":"b"}', "field 'id' is True, expected text"),
    "empty id": (b'{"id":" ","instruction":"a","output":"b"}', "field 'id' is ' ', expected text"),
    "id twice": (b'{"id":"x","instruction":"b","output":"b"}', "id 'x' is that of row 1 too"),
    "nested deeply": (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "huge number": (b'{"x":' + b"9" * 5000 + b"}", "a number has more than 4300 digits"),
    "too long": (b'{"x":"' + b"x" * MAX_ROW_BYTES + b'"}', f"longer than {MAX_ROW_BYTES} bytes"),
    "too long a blank": (b" " * (MAX_ROW_BYTES + 9), f"longer than {MAX_ROW_BYTES} bytes"),
    "messages null": (b'{"messages":null}', "field 'messages' must be a list"),
    "one message": (
        b'{"messages":[{"role":"user","content":"a"}]}',
        "field 'messages' must be a list of at least",
    ),
    "message that is text": (
        b'{"messages":["a","b"]}',
        "field 'messages' holds something that is no object",
    ),
    "message without content": (b'{"messages":[{"role":"user"},{}]}', "lacks field 'content'"),
    "no answer at the end": (
        b'{"messages":[{"role":"assistant","content":"a"},{"role":"user","content":"b"}]}',
        "field 'messages' must end with a user and then an assistant message",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_told_with_file_row_and_reason(file: Path, name: str) -> None:
    bad, reason = BAD_ROWS[name]
    first = b'{"id":"x","instruction":"a","output":"b"}\n\n'
    with pytest.raises(DataError) as caught:
        read(file, first + bad + b"\n" + GOOD)
    assert caught.value.exit_code == 65
    assert str(caught.value).startswith(f"{file}:3: ")
    assert reason in str(caught.value)
    rows = read(file, first + bad + b"\n" + GOOD, on_bad_row="quarantine")
    assert [(row.source, row.row) for row in rows.bad_rows] == [(str(file), 3)]
    assert [example.references for example in rows.examples] == [("b",), ("b",)]


def test_a_message_never_repeats_a_whole_row_or_its_control_characters(file: Path) -> None:
    rows = [{"id": "\x1b[31m" + "x" * 100_000, "prompt": "p", "response": "r"}] * 2
    with pytest.raises(DataError) as caught:
        read(file, "\n".join(map(json.dumps, rows)).encode())
    reason = str(caught.value).removeprefix(str(file))
    assert len(reason) < 200 and "\x1b" not in reason


def test_more_bad_rows_than_allowed_stop_a_quarantining_run_too(file: Path) -> None:
    content = GOOD + b"\n{}\n[]\n{}\n"
    assert len(read(file, content, on_bad_row="quarantine", max_bad_rows=3).bad_rows) == 3
    with pytest.raises(DataError, match=r"rows\.jsonl:4: .*bad row 3; data\.max_bad_rows is 2"):
        read(file, content, on_bad_row="quarantine", max_bad_rows=2)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf", b"{}\n[]"])
def test_a_file_without_a_usable_row_is_refused(file: Path, content: bytes) -> None:
    with pytest.raises(DataError, match="no row left"):
        read(file, content, on_bad_row="quarantine")


# --- Parquet and other places


def test_parquet_rows_are_read_like_those_of_jsonl(tmp_path: Path, file: Path) -> None:
    rows = [
        {"instruction": f"i{n}", "input": "c" if n % 2 else "", "output": f"o{n}"} for n in range(7)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = read_rows(str(tmp_path / "rows.parquet"), "data.train")
    wanted = read(file, "\n".join(map(json.dumps, rows)).encode())
    assert (found.examples, found.digest) == (wanted.examples, wanted.digest)
    pq.write_table(pa.table({"prompt": ["p"], "response": [["a", "b"]]}), tmp_path / "rows.parquet")
    listed = read_rows(str(tmp_path / "rows.parquet"), "data.train")
    assert listed.examples[0].references == ("a", "b")


def test_a_parquet_file_is_never_held_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    with pq.ParquetWriter(
        path, pa.schema({"prompt": pa.string(), "response": pa.string()})
    ) as file:
        for group in range(32):
            text = random.Random(group).randbytes(512 * 1024).hex()
            texts = [text[start : start + 1024] for start in range(0, len(text), 1024)]
            file.write_table(pa.table({"prompt": texts, "response": ["x"] * 1024}))
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in ParquetRows(str(path), path).rows()]
    assert len(held) == 32 * 1024
    assert max(held) < 12 * 2**20, "a batch and its pages, of 32 MiB"


def test_a_null_in_parquet_is_a_missing_field_and_its_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"], "response": ["x", None]}), path)
    with pytest.raises(DataError, match=r"rows\.parquet:2: lacks field 'response'"):
        read_rows(str(path), "data.train")


def test_a_damaged_parquet_file_is_a_data_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": ["a"] * 999, "response": ["x"] * 999}), path)
    whole = path.read_bytes()
    for damaged in (
        b"PAR1",
        whole[:-20],
        whole[: len(whole) // 2],
        b"{}",
        whole[:4] + b"\xff" * 60 + whole[64:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"rows\.parquet"):
            read_rows(str(path), "data.train")


def test_a_missing_file_is_named_as_written_and_where_it_was_looked_for(tmp_path: Path) -> None:
    missing = {
        "nowhere.jsonl": "does not exist",
        "some/where.jsonl": "does not exist",
        "some/deep/where": "does not exist",
        str(tmp_path): "is a folder",
        "package:not_installed_here/x.jsonl": "the package 'not_installed_here' is not installed",
        "package:pocl_dist/bundled/nothing.jsonl": "the package 'pocl_dist' holds no",
        "package:pocl_dist/../pyproject.toml": "the package 'pocl_dist' holds no",
    }
    for source, reason in missing.items():
        with pytest.raises(MissingInputError) as caught:
            read_rows(source, "data.eval.0")
        assert str(caught.value).startswith("data.eval.0: ")
        assert source in str(caught.value) and reason in str(caught.value)


def test_a_file_of_a_package_is_read() -> None:
    assert len(read_rows("package:pocl_dist/bundled/dev.jsonl", "data.dev").examples) > 10


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_missing_input(file: Path) -> None:
    file.write_bytes(GOOD)
    file.chmod(0)
    with pytest.raises(MissingInputError, match="may not be read"):
        read_rows(str(file), "data.train")
