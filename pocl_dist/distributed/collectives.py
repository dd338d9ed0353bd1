"""The few small collectives of the train loop: all ranks call every function here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from pocl_dist.distributed.process_group import Rank


def broadcast_floats(values: Sequence[float], rank: Rank) -> list[float]:
    """Returns rank 0's values on every rank, as fp64; their number must be the same on all."""
    tensor = torch.tensor(values, dtype=torch.float64, device=rank.device)
    dist.broadcast(tensor, src=0)
    return [float(value) for value in tensor.tolist()]


def gather_floats(values: Sequence[float], rank: Rank) -> list[list[float]]:
    """Returns the values of every rank, in rank order, on every rank, as fp64."""
    mine = torch.tensor(values, dtype=torch.float64, device=rank.device)
    rows = [torch.empty_like(mine) for _ in range(rank.world_size)]
    dist.all_gather(rows, mine)
    return [[float(value) for value in row.tolist()] for row in rows]


def gather_ints(values: Sequence[int], rank: Rank) -> list[list[int]]:
    """Returns the 64-bit integers of every rank, in rank order, on every rank."""
    mine = torch.tensor(values, dtype=torch.int64, device=rank.device)
    rows = [torch.empty_like(mine) for _ in range(rank.world_size)]
    dist.all_gather(rows, mine)
    return [[int(value) for value in row.tolist()] for row in rows]


def gather_int_lists(values: Sequence[int], rank: Rank) -> list[list[int]]:
    """Returns the 64-bit integers of every rank, in rank order; each rank may have another number.

    One exchange of the lengths, one of the padded values.
    """
    lengths = [row[0] for row in gather_ints([len(values)], rank)]
    padded = [*values, *([0] * (max(lengths) - len(values)))]
    return [row[:n] for row, n in zip(gather_ints(padded, rank), lengths, strict=True)]


def gather_texts(text: str, rank: Rank) -> list[str]:
    """Returns the text of every rank, in rank order, on every rank."""
    data = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8).to(rank.device)
    lengths = [row[0] for row in gather_ints([len(data)], rank)]
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=rank.device)
    padded[: len(data)] = data
    rows = [torch.empty_like(padded) for _ in range(rank.world_size)]
    dist.all_gather(rows, padded)
    return [bytes(row[:n].tolist()).decode().strip() for row, n in zip(rows, lengths, strict=True)]


def on_any_rank(flag: bool, rank: Rank) -> bool:
    """Returns, on every rank, whether the flag is set on one of them."""
    return any(row[0] for row in gather_ints([int(flag)], rank))


def barrier(rank: Rank) -> None:
    """Waits for all ranks."""
    gather_ints([0], rank)
