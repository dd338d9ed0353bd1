"""The scores of all rows as columns, joined to the rows by id. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pocl_dist.data.columns import (
    TextColumn,
    are_equal,
    is_in,
    join,
    numbers_of,
    order_of,
    slices,
    take,
    text_array,
)
from pocl_dist.data.sources import Rows
from pocl_dist.difficulty.signals import SIGNALS
from pocl_dist.errors import DataError, MissingInputError
from pocl_dist.files import JSONValue
from pocl_dist.list_digest import ListDigest
from pocl_dist.pipeline.difficulty_files import read_quarantine, read_shards

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Scores:
    """Scored rows in the order of their ids, each once."""

    ids: pa.LargeStringArray
    columns: Mapping[str, np.ndarray]  # per signal, float64

    def digest(self) -> str:
        """Returns a digest of ids and scores."""
        found = ListDigest()
        for part in slices(len(self.ids)):
            values = [self.columns[name][part].tolist() for name in ("rouge_l", "cross_entropy")]
            rows = zip(self.ids[part].to_pylist(), *values, strict=True)
            found.extend(list[JSONValue](row) for row in rows)
        return found.hexdigest()


def read_scores(folder: Path) -> Scores:
    """Returns the scores of all shards.

    Raises as `read_shards` does, and DataError (65) for a row that stands in two shards.
    """
    import pyarrow as pa

    paths, ends, ids = list[Path](), [0], list[pa.LargeStringArray]()
    parts: dict[str, list[np.ndarray]] = {name: [] for name in SIGNALS}
    for path, table in read_shards(folder, ["example_id", *SIGNALS]):
        paths.append(path)
        ends.append(ends[-1] + len(table))
        ids += [chunk.cast(pa.large_string()) for chunk in table.column("example_id").chunks]
        for name in SIGNALS:
            parts[name] += map(numbers_of, table.column(name).chunks)
    joined = join(ids)
    ids.clear()
    order = order_of(joined)
    in_order = take(joined, order)
    del joined
    _check_once(in_order, order, paths, ends)
    columns = {name: np.concatenate(found)[order] for name, found in parts.items() if found}
    return Scores(in_order, columns)


def _check_once(
    ids: pa.LargeStringArray, order: np.ndarray, paths: list[Path], ends: list[int]
) -> None:
    """Raises DataError (65) for the first row, as they were read, that was there before."""
    again = [
        np.flatnonzero(are_equal(ids[part.start + 1 : part.stop + 1], ids[part])) + part.start + 1
        for part in slices(len(ids) - 1)
    ]
    places = np.concatenate(again) if again else np.array([], dtype=np.int64)
    if len(places):
        place = places[np.argmin(order[places])]
        path = paths[int(np.searchsorted(ends, order[place], side="right")) - 1]
        raise DataError(
            f"{path}: row {ids[int(place)].as_py()!r} is in another shard too; measure anew"
        )


def rows_of_scores(scores: Scores, rows: Rows, folder: Path) -> np.ndarray:
    """Returns the place among the training rows of each scored one.

    Raises MissingInputError (66) without scores, DataError (65) when they are not those of the
    rows, but for those that `measure` has put into quarantine.
    """
    if not len(scores.ids):
        raise MissingInputError(f"{folder} holds no scores: run `pocl-dist measure` first")
    ids = rows.ids()
    is_left_out = is_in(ids, text_array(read_quarantine(folder)))
    order = order_of(ids)
    expected: np.ndarray = order[~is_left_out[order]]
    del order
    if len(expected) != len(scores.ids) or not all(
        are_equal(scores.ids[part], take(ids, expected[part])).all()
        for part in slices(len(expected))
    ):
        _refuse(scores.ids, ids, is_left_out, folder)
    return expected


def _refuse(
    scored: pa.LargeStringArray, ids: pa.LargeStringArray, is_left_out: np.ndarray, folder: Path
) -> None:
    expected = take(ids, np.flatnonzero(~is_left_out))
    missing = take(expected, np.flatnonzero(~is_in(expected, scored)))
    extra = take(scored, np.flatnonzero(~is_in(scored, expected)))
    findings = (
        ("rows of data.train are not scored", TextColumn(missing)),
        ("scored rows are not in data.train", TextColumn(extra)),
    )
    parts = [
        f"{len(names)} {what} (first: {', '.join(names[:5])})" for what, names in findings if names
    ]
    raise DataError(f"{folder}: {'; '.join(parts)}; run `pocl-dist measure` to the end")
