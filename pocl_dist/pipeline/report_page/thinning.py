"""Fewer rows for a chart, such that it looks the same: the ends and the extremes stay."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

JSONRow = Mapping[str, object]


def numbers(rows: Sequence[JSONRow], name: str) -> list[float | None]:
    """Returns a column; None where a row has no number there."""
    values = (row.get(name) for row in rows)
    return [
        float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
        for value in values
    ]


def thinned(
    rows: Sequence[JSONRow], leading: str, others: Sequence[str], group: str, limit: int
) -> list[int]:
    """Returns the places of at most `limit` rows, ascending; all of them when there are so few.

    First and last row of each `group`, the extremes of every column, and of buckets of neighbours
    the least and the greatest of `leading`. Raises ValueError where `limit` cannot hold the ends.
    """
    if len(rows) <= limit:
        return list(range(len(rows)))
    kept = {0, len(rows) - 1}
    for place, (row, after) in enumerate(itertools.pairwise(rows)):
        if row.get(group) != after.get(group):
            kept |= {place, place + 1}
    for name in (leading, *others):
        kept |= _extremes(numbers(rows, name), range(len(rows)))
    num_buckets = (limit - len(kept)) // 2
    if num_buckets < 1:
        raise ValueError(f"{limit} rows cannot hold {len(kept)} ends and extremes")
    column = numbers(rows, leading)
    for index in range(num_buckets):
        start, stop = (len(rows) * edge // num_buckets for edge in (index, index + 1))
        kept |= _extremes(column, range(start, stop))
    return sorted(kept)


def _extremes(column: Sequence[float | None], places: range) -> set[int]:
    """Returns the places of the least and the greatest number, the first of equal ones."""
    known = [(value, place) for place in places if (value := column[place]) is not None]
    if not known:
        return set()
    least = min(known)
    greatest = max(known, key=lambda pair: (pair[0], -pair[1]))
    return {least[1], greatest[1]}


def running_mean(values: Sequence[float | None], half_width: int) -> list[float | None]:
    """Returns at each place the mean of the numbers at most `half_width` away; None of none."""
    known = [0.0 if value is None else value for value in values]
    sums = [0.0, *itertools.accumulate(known)]
    counts = [0, *itertools.accumulate(int(value is not None) for value in values)]
    means: list[float | None] = []
    for place in range(len(values)):
        start, stop = max(0, place - half_width), min(len(values), place + half_width + 1)
        count = counts[stop] - counts[start]
        means.append((sums[stop] - sums[start]) / count if count else None)
    return means


def evenly(num_rows: int, limit: int) -> int:
    """Returns the least stride with which at most `limit` of the rows are taken, the last kept."""
    return max(1, -(-(num_rows - 1) // max(1, limit - 1)))
