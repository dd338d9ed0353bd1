"""Which examples of a global batch share a micro-batch and a rank; the batch itself is given.

Padding is what a short row costs beside a long one, so rows of like length go together. ZeRO
gathers every layer in lockstep, so at any time all ranks run micro-batches of like cost. Positions
are those in the global batch; every function is pure, so all ranks find the same layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def _fewest(num_rows: int, world_size: int, micro_batch_size: int) -> int:
    """Returns the fewest micro-batches per rank in which `num_rows` find room."""
    return max(1, math.ceil(num_rows / world_size / micro_batch_size))


def padded_layout(
    lengths: Sequence[int], world_size: int, micro_batch_size: int, max_waste: float
) -> list[list[list[int]]]:
    """Returns, for every rank, its micro-batches as positions: rows of like length together.

    All ranks have as many micro-batches, with at most `micro_batch_size` rows each (some may have
    none). There are as few as possible, unless more than the share `max_waste` of the work would
    be padding or waiting for a rank with a larger micro-batch: then up to twice as many. The
    costliest come first, so that a step too large for the memory fails at once.
    """
    fewest = _fewest(len(lengths), world_size, micro_batch_size)
    order = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    longest_first = [lengths[position] for position in order]
    for count in range(fewest, 2 * fewest + 1):
        runs = _cut(longest_first, count * world_size, micro_batch_size)
        sizes = sorted((len(run) * longest_first[run.start] for run in runs), reverse=True)
        # Ranks wait for the one with the largest micro-batch.
        taken = world_size * sum(sizes[::world_size])
        if 1 - sum(lengths) / taken <= max_waste:
            break
    parts = [[order[index] for index in run] for run in runs]
    parts += [[] for _ in range(count * world_size - len(parts))]
    return _deal(parts, [_padded_size(part, lengths) for part in parts], world_size)


def packed_layout(
    lengths: Sequence[int], world_size: int, micro_batch_size: int
) -> list[list[list[int]]]:
    """Returns, for every rank, its micro-batches as positions: nearly equal sums of lengths.

    As `padded_layout`, where nothing is padded: long and short examples share a micro-batch of at
    most `micro_batch_size` examples.
    """
    count = _fewest(len(lengths), world_size, micro_batch_size)
    parts = _even_sums(lengths, count * world_size, micro_batch_size)
    return _deal(parts, [sum(lengths[i] for i in part) for part in parts], world_size)


def packed_rows(lengths: Sequence[int], max_padding: float) -> list[list[int]]:
    """Returns the examples of a micro-batch as rows that hold several each, nearly as long.

    Takes the most rows whose padding stays within `max_padding`: attention under a block mask costs
    the square of a row's length. One row always does, without any padding.
    """
    for num_rows in range(len(lengths), 1, -1):
        rows = _even_sums(lengths, num_rows, len(lengths))
        widest = max(sum(lengths[i] for i in row) for row in rows)
        if 1 - sum(lengths) / (num_rows * widest) <= max_padding:
            return rows
    return [sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))]


def _padded_size(part: Sequence[int], lengths: Sequence[int]) -> int:
    return len(part) * max((lengths[i] for i in part), default=0)


def _cut(longest_first: Sequence[int], num_parts: int, max_rows: int) -> list[range]:
    """Returns runs of neighbours, at most `num_parts`, such that the largest is as small as can be.

    Size is rows times longest row: what a micro-batch costs in time and memory, padding included.
    """
    low, high = longest_first[0], max_rows * longest_first[0]
    while low < high:
        middle = (low + high) // 2
        if len(_fill(longest_first, middle, max_rows)) <= num_parts:
            high = middle
        else:
            low = middle + 1
    return _fill(longest_first, low, max_rows)


def _fill(longest_first: Sequence[int], max_size: int, max_rows: int) -> list[range]:
    """Returns runs that each take as many of the next rows as fit."""
    runs, start = [], 0
    while start < len(longest_first):
        rows = min(max_rows, max_size // longest_first[start], len(longest_first) - start)
        runs.append(range(start, start + rows))
        start += rows
    return runs


def _even_sums(lengths: Sequence[int], num_parts: int, max_items: int) -> list[list[int]]:
    """Returns a deal in which each length, longest first, goes to the part with the least."""
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    sums = [0] * num_parts
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        open_parts = [p for p in range(num_parts) if len(parts[p]) < max_items]
        part = min(open_parts, key=lambda p: (sums[p], p))
        parts[part].append(position)
        sums[part] += lengths[position]
    return parts


def _deal(
    parts: Sequence[list[int]], costs: Sequence[int], world_size: int
) -> list[list[list[int]]]:
    """Returns the parts of each rank: neighbours in cost at the same time, sums nearly equal.

    Of the parts of one micro-step the costliest goes to the rank with the least so far.
    """
    by_cost = sorted(range(len(parts)), key=lambda part: (-costs[part], part))
    shares: list[list[list[int]]] = [[] for _ in range(world_size)]
    totals = [0] * world_size
    for start in range(0, len(parts), world_size):
        ranks = sorted(range(world_size), key=lambda rank: (totals[rank], rank))
        for rank, part in zip(ranks, by_cost[start : start + world_size], strict=True):
            shares[rank].append(parts[part])
            totals[rank] += costs[part]
    return shares
