"""Turns a teacher's answers to a shard's batches into its file; the same for actors and ranks."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from pocl_dist.files import JSONValue
from pocl_dist.records import LMHead, TeacherOutput
from pocl_dist.teacher.cache_files import (
    HEAD,
    HIDDEN,
    LOG_TAIL,
    LOGPROBS,
    TOKEN_IDS,
    CacheEntry,
    rows_of,
    write_entry,
)
from pocl_dist.teacher.cache_work import CacheShard
from pocl_dist.teacher.top_k import cut_to_top_k


@dataclass(frozen=True)
class CacheContent:
    """What is kept of a teacher's answers, and where."""

    folder: Path
    top_k: int | None = None  # None: hidden states
    temperatures: tuple[float, ...] = ()  # of the truncation errors


class ShardWriter:
    """Collects the answers to a shard's batches, in order, and writes them."""

    def __init__(self, content: CacheContent, shard: CacheShard) -> None:
        self.content = content
        self.shard = shard
        self._parts: list[dict[str, torch.Tensor]] = []
        self._error_sums: dict[str, float] = {}

    def add(self, output: TeacherOutput) -> None:
        """Keeps what a teacher that runs says of the next batch."""
        assert output.hidden_NH is not None and output.head is not None
        if self.content.top_k is None:
            self._parts.append({HIDDEN: output.hidden_NH.cpu()})
            return
        kept = cut_to_top_k(
            output.hidden_NH,
            output.head,
            self.content.top_k,
            self.content.temperatures,
            self._error_sums,
        )
        self._parts.append(
            {
                TOKEN_IDS: kept.token_ids_NK.to(torch.int32).cpu(),
                LOGPROBS: kept.logprobs_NK.cpu(),
                LOG_TAIL: kept.log_tail_N.cpu(),
            }
        )

    def write(self, failed: Set[str] = frozenset(), num_halved: int = 0) -> CacheEntry | None:
        """Writes the shard's tensors, then the JSON that makes them count.

        Without the rows `failed`, of which nothing was added; returns None when none is left.
        """
        shard = self.shard.without(failed)
        if not shard.batches:
            return None
        tensors = {key: torch.cat([part[key] for part in self._parts]) for key in self._parts[0]}
        assert all(len(tensor) == shard.num_labels for tensor in tensors.values())
        error_sums = None if self.content.top_k is None else self._error_sums
        folder, rows = self.content.folder, rows_of(shard)
        return write_entry(folder, shard.name, tensors, rows, error_sums, num_halved=num_halved)


def write_head(folder: Path, head: LMHead) -> None:
    """Writes the teacher's head: its tensors, and its numbers beside them."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, JSONValue] = {}
    for field in fields(head):
        value = getattr(head, field.name)
        if isinstance(value, torch.Tensor):
            tensors[field.name] = value.detach().cpu()
        else:
            scalars[field.name] = value
    write_entry(folder, HEAD, tensors, scalars=scalars)
