"""Columns: what Python's lists, sets and sorts say, and no pandas."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pocl_dist.data import columns
from pocl_dist.data.columns import (
    TextColumn,
    are_equal,
    is_in,
    join,
    number_array,
    numbers_of,
    order_of,
    places_in,
    take,
    text_array,
    write_columns,
)
from pocl_dist.files import digest_of
from pocl_dist.list_digest import ListDigest


def texts(seed: int, num_texts: int = 60) -> list[str]:
    """Returns texts of which some are equal, some begin like others, and few are ASCII."""
    generator = random.Random(seed)
    alphabet = ["", "a", "b", "aa", "é", "z", "한", "\U0001f600", "\uffff", " "]
    return ["".join(generator.choices(alphabet, k=3)) for _ in range(num_texts)]


@pytest.mark.parametrize("seed", range(4))
def test_columns_say_what_lists_and_sets_do(seed: int) -> None:
    mine, others = texts(seed), texts(seed + 100)
    column, other_column = text_array(mine), text_array(others)
    assert column.to_pylist() == mine and join([column, other_column]).to_pylist() == mine + others
    assert order_of(column).tolist() == sorted(range(60), key=lambda place: mine[place])
    assert is_in(column, other_column).tolist() == [text in others for text in mine]
    assert are_equal(column[3:], column[:-3]).tolist() == [
        a == b for a, b in zip(mine[3:], mine, strict=False)
    ]
    expected = [mine.index(text) if text in mine else -1 for text in others]
    assert places_in(column, other_column).tolist() == expected
    places = np.array(random.Random(seed).choices(range(60), k=9))
    assert take(column, places).to_pylist() == [mine[place] for place in places]


def test_a_text_column_reads_and_compares_like_a_tuple() -> None:
    mine = tuple(texts(1))
    column = TextColumn(text_array(mine))
    assert column == mine and mine == column and column == TextColumn(text_array(mine))
    assert column != mine[1:] and column != (*mine[:-1], "other") and column != 5
    assert (len(column), column[4], column[-1], column[2:4]) == (
        60,
        mine[4],
        mine[-1],
        [*mine[2:4]],
    )
    assert tuple(column) == mine and mine[7] in column and hash(column) == hash(mine)


def test_numbers_come_back_also_from_the_middle_of_a_column() -> None:
    for values in (np.arange(9) / 7, np.arange(9), np.arange(9, dtype=np.int32), np.empty(0)):
        assert numbers_of(number_array(values)[2:5]).tolist() == values[2:5].tolist()


def test_a_file_is_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "SLICE_ROWS", 4)
    names, values = text_array(texts(2, 10)), np.arange(10) / 3

    def part_of(part: slice) -> dict[str, object]:
        return {"name": names[part], "value": number_array(values[part])}

    write_columns(tmp_path / "columns.parquet", 10, part_of)  # type: ignore[arg-type]
    table = pq.read_table(tmp_path / "columns.parquet").to_pydict()
    assert table == {"name": names.to_pylist(), "value": values.tolist()}


@pytest.mark.parametrize("num_items", [0, 1, 63, 64, 65, 300])
def test_the_digest_of_a_list_that_comes_item_by_item_is_that_of_the_list(num_items: int) -> None:
    items = [[text, index / 3] for index, text in enumerate(texts(3, num_items))]
    found, around = ListDigest(), ListDigest(before='{"a":')
    found.extend(items)  # type: ignore[arg-type]
    around.extend(items)  # type: ignore[arg-type]
    assert found.hexdigest() == digest_of(items)  # type: ignore[arg-type]
    assert around.hexdigest(after=',"b":1}') == digest_of({"a": items, "b": 1})  # type: ignore[dict-item]
