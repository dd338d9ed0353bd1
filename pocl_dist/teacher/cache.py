"""The teacher from its cache: no model and no engine is loaded, only its head.

N label positions, H hidden size, K kept tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pocl_dist.distributed.process_group import Rank
from pocl_dist.errors import MismatchError, MissingInputError
from pocl_dist.records import Batch, EncodedExample, LMHead, TeacherOutput, TeacherTopK
from pocl_dist.teacher.cache_copy import REMEDY
from pocl_dist.teacher.cache_files import (
    HEAD,
    HIDDEN,
    LOG_TAIL,
    LOGPROBS,
    TOKEN_IDS,
    Place,
    entry_names,
    is_cached,
    read_entry,
    read_index,
    read_shards,
    tensor_file,
)

# Shards that are mapped at once: their pages count as this process's memory while they are.
MAX_OPEN_SHARDS = 16


class CachedTeacher:
    """Answers a micro-batch from files: hidden states and the head, or top-k.

    Every rank reads the rows of its own batches; the head (cache_hidden) is whole on every rank's
    device: vocabulary x hidden size numbers of the teacher's dtype.
    """

    def __init__(
        self,
        folder: Path,
        examples: Iterable[EncodedExample],
        rank: Rank,
        dtype: torch.dtype,
        *,
        is_top_k: bool,
    ) -> None:
        """Checks that all of `examples` are there; whether files are damaged was asked before.

        Raises MissingInputError (66) for rows that are not cached, MismatchError (78) for files of
        another dtype than `dtype`.
        """
        self._folder = folder
        self._is_top_k = is_top_k
        self._open: OrderedDict[str, safe_open] = OrderedDict()
        self._index = read_index(read_shards(folder))
        missing = [row.example_id for row in examples if not is_cached(self._index, row)]
        if missing:
            raise MissingInputError(
                f"{folder}: {len(missing)} training rows are not cached as they are encoded now "
                f"(first: {missing[0]!r}); {REMEDY}"
            )
        self.head: LMHead | None = None
        if not is_top_k:
            if HEAD not in entry_names(folder):
                raise MissingInputError(f"{folder}: the teacher's head is missing; {REMEDY}")
            self.head = read_head(folder, rank.device)
            _check_dtype(folder, self.head.weight_VH.dtype, dtype)

    @contextmanager
    def answer(self, batch: Batch) -> Iterator[TeacherOutput]:
        """Yields what the cache holds of the batch's labelled positions, on the batch's device.

        Not collective.
        """
        device = batch.input_ids_BT.device
        places = [self._index[example_id] for example_id in batch.example_ids]
        if self._is_top_k:
            output = TeacherOutput(
                top_k=TeacherTopK(
                    self._read(places, TOKEN_IDS, device).long(),
                    self._read(places, LOGPROBS, device),
                    self._read(places, LOG_TAIL, device),
                )
            )
        else:
            output = TeacherOutput(self._read(places, HIDDEN, device), self.head)
        num_cached = sum(place.stop - place.start for place in places)
        assert num_cached == batch.num_label_tokens, "labels of a batch are those of its rows"
        yield output

    def _read(self, places: list[Place], key: str, device: torch.device) -> torch.Tensor:
        """Returns the rows' positions end to end; a batch without rows gets 0 positions."""
        if not places:
            first = next(iter(self._index.values()))
            return self._slice(first, key)[:0].to(device)
        return torch.cat([self._slice(place, key) for place in places]).to(device)

    def _slice(self, place: Place, key: str) -> torch.Tensor:
        piece = self._shard(place.shard).get_slice(key)[place.start : place.stop]
        return cast("torch.Tensor", piece)

    def _shard(self, name: str) -> safe_open:
        """Returns a mapped shard; the one that was not used for longest is let go."""
        if name not in self._open:
            self._open[name] = safe_open(tensor_file(self._folder, name), framework="pt")
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        return self._open[name]


def read_head(folder: Path, device: torch.device) -> LMHead:
    """Returns the cached head on `device`."""
    tensors = load_file(tensor_file(folder, HEAD), device=str(device))
    scalars = read_entry(folder, HEAD).scalars or {}
    return LMHead(**tensors, **scalars)  # type: ignore[arg-type]


def _check_dtype(folder: Path, found: torch.dtype, expected: torch.dtype) -> None:
    if found != expected:
        raise MismatchError(
            f"{folder}: engine.dtype: the teacher was cached in {found}, training is"
            f" in {expected}; use the earlier value, or another run_dir"
        )
