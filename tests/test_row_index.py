"""Rows that are read once and opened after that: the same rows, ids, digest and errors."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pocl_dist.data import sources
from pocl_dist.data.row_ids import FirstRows
from pocl_dist.data.row_index import index_rows, open_index
from pocl_dist.data.sources import RowPolicy, Rows, read_rows
from pocl_dist.errors import DataError, MismatchError, MissingInputError
from pocl_dist.files import digest_of, sha256_bytes

HASH = sha256_bytes(json.dumps(["a", "", ["x"], []]).encode())[:16]  # the id of a row without one
QUARANTINE = RowPolicy(None, "quarantine", 1000)


def mixed_rows(seed: int, num_rows: int) -> Iterator[dict[str, object]]:
    """Yields rows of every form; many are identical, some ids stand twice, some rows are bad."""
    generator = random.Random(seed)
    for _ in range(num_rows):
        text = generator.choice(["a", "é", "한", "b\u2028c"])
        output = generator.choice(["x", ["y", "z"]])
        row: dict[str, object] = {"instruction": text, "output": output}
        turns = [{"role": r, "content": text} for r in ("system", "user", "assistant")]
        row = generator.choice([row, row, {"messages": turns}, {"prompt": text, "response": "\n"}])
        if generator.random() < 0.3:
            names = ["one", 'a "quoted" one', "é", HASH, f"{HASH}-2", *map(str, range(40))]
            row["id"] = generator.choice(names)
        yield row


def write(path: Path, rows: Iterator[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain_ids(path: Path) -> tuple[list[str], list[int]]:
    """Returns the ids of the usable rows, and the numbers of bad ones, by dictionaries."""
    seen: dict[str, int] = {}
    num_same: dict[str, int] = {}
    bad = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        row = json.loads(line)
        if not str(row.get("response", "x")).strip():
            bad.append(number)
            continue
        if "messages" in row:
            turns = [[turn["role"], turn["content"]] for turn in row["messages"]]
            content = [turns[1][1], "", [turns[2][1]], turns[:1]]
        else:
            output = row.get("output", row.get("response"))
            references = output if isinstance(output, list) else [output]
            content = [row.get("instruction", row.get("prompt")), "", references, []]
        name = str(row.get("id", ""))
        if not name:
            name = sha256_bytes(json.dumps(content).encode())[:16]
            num_same[name] = num_same.get(name, 0) + 1
            name += f"-{num_same[name]}" if num_same[name] > 1 else ""
        if name in seen:
            bad.append(number)
        else:
            seen[name] = number
    return list(seen), bad


def assert_same(found: Rows, expected: Rows) -> None:
    assert tuple(found.examples) == tuple(expected.examples)
    assert [found.examples[row] for row in range(len(found.examples))] == list(expected.examples)
    assert found.ids().to_pylist() == expected.ids().to_pylist()
    assert (found.bad_rows, found.digest) == (expected.bad_rows, expected.digest)


@pytest.mark.parametrize("num_held", [1, 7, 20_000])
@pytest.mark.parametrize("seed", range(3))
def test_ids_and_bad_rows_do_not_depend_on_how_many_rows_are_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, num_held: int
) -> None:
    path = write(tmp_path / "rows.jsonl", mixed_rows(seed, 150))
    monkeypatch.setattr(sources, "MAX_HELD_ROWS", num_held)
    rows = read_rows(str(path), "data.train", on_bad_row="quarantine", max_bad_rows=1000)
    ids, bad = plain_ids(path)
    assert [example.example_id for example in rows.examples] == ids
    assert [row.row for row in rows.bad_rows] == bad and len(bad) > 10
    parts = [
        list(map(str, (e.example_id, e.prompt, e.context, e.references, e.history)))
        for e in rows.examples
    ]
    assert rows.digest == digest_of(parts)  # type: ignore[arg-type]
    for limit in (1, 20, len(ids)):
        cut = read_rows(
            str(path), "data.train", limit=limit, on_bad_row="quarantine", max_bad_rows=1000
        )
        assert [example.example_id for example in cut.examples] == ids[:limit]
    number = bad[0]
    with pytest.raises(DataError, match=rf"rows\.jsonl:{number}: "):
        read_rows(str(path), "data.train")


def test_first_rows_remembers_what_a_dictionary_does() -> None:
    generator, found, expected = random.Random(1), FirstRows(), dict[int, int]()
    for number in range(1, 60):
        keys = [generator.randrange(2**64) >> generator.choice([0, 56]) for _ in range(40)]
        assert found.find(keys) == [expected.get(key, 0) for key in keys]
        new = {key: number for key in keys if key not in expected}
        found.add(new)
        expected |= new
    assert max(map(len, (keys for keys, _ in found._runs))) > 1000  # runs were merged


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_that_are_opened_are_those_that_are_read(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / "rows.jsonl", mixed_rows(5, 80))
    if suffix == "parquet":
        path = tmp_path / "rows.parquet"
        rows = [{"id": f"{n % 60}", "prompt": f"é{n}", "response": "x"} for n in range(70)]
        pq.write_table(pa.Table.from_pylist(rows), path)
    expected = read_rows(str(path), "data.train", on_bad_row="quarantine", max_bad_rows=1000)
    assert len(expected.bad_rows) > 5
    assert_same(index_rows(str(path), "data.train", tmp_path / "index", QUARANTINE), expected)
    opened = open_index(str(path), "data.train", tmp_path / "index", QUARANTINE)
    assert_same(opened, expected)
    assert opened.examples[2:4] == tuple(expected.examples[2:4])
    assert opened.examples[-1] == expected.examples[-1]
    with pytest.raises(IndexError):
        opened.examples[len(expected.examples)]
    strict = RowPolicy(None, "quarantine", 3)
    for policy in (strict, RowPolicy()):
        with pytest.raises(DataError) as by_reading:
            index_rows(str(path), "data.train", tmp_path / "other", policy)
        with pytest.raises(DataError) as by_opening:
            open_index(str(path), "data.train", tmp_path / "index", policy)
        assert str(by_opening.value) == str(by_reading.value)
    assert not (tmp_path / "other").exists()


def test_rows_are_read_again_only_when_something_changed(tmp_path: Path) -> None:
    path, folder = tmp_path / "rows.jsonl", tmp_path / "index"
    path.write_text('{"prompt":"a","response":"b"}\n{"prompt":"c","response":"d"}\n')

    def when() -> tuple[int, int]:
        rows = index_rows(str(path), "data.train", folder, RowPolicy())
        return (folder / "index.json").stat().st_ino, len(rows.examples)

    before = when()
    assert when() == before
    for changed in (path.read_text().replace("d", "e"), path.read_text() + "\n"):
        path.write_text(changed)
        with pytest.raises(MismatchError, match=r"rows\.jsonl was changed since its rows were"):
            open_index(str(path), "data.train", folder, RowPolicy())
        assert when() != before
        before = when()
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        kind = MissingInputError if file.name == "index.json" else MismatchError
        with pytest.raises(kind, match="pocl-dist plan"):
            open_index(str(path), "data.train", folder, RowPolicy())
        assert when() != before
        before = when()
    with pytest.raises(MissingInputError, match=r"data\.train: .*nowhere does not hold the rows"):
        open_index(str(path), "data.train", tmp_path / "nowhere", RowPolicy())


def test_with_a_limit_only_what_was_read_counts(tmp_path: Path) -> None:
    path, folder = tmp_path / "rows.jsonl", tmp_path / "index"
    lines = [f'{{"prompt":"p{n}","response":"r"}}\n' for n in range(9)]
    path.write_text("".join(lines))
    limited = RowPolicy(4)
    expected = index_rows(str(path), "data.train", folder, limited)
    path.write_text("".join(lines[:4]) + "not even JSON")
    assert_same(open_index(str(path), "data.train", folder, limited), expected)
    with pytest.raises(MismatchError, match=r"holds the rows of .* \(limit 4\)"):
        open_index(str(path), "data.train", folder, RowPolicy(3))
    path.write_text("".join(lines[1:]))
    with pytest.raises(MismatchError, match="was changed"):
        open_index(str(path), "data.train", folder, limited)
    changed = index_rows(str(path), "data.train", folder, limited)
    assert [example.prompt for example in changed.examples] == ["p1", "p2", "p3", "p4"]
