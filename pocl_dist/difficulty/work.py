"""What actors are sent: fixed batches of rows, and shards of whole batches.

The batches are a function of the rows and the batch size alone. Padding decides rounding, so
results are the same bits for any number of actors, any shard size and any interruption.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np

from pocl_dist.distributed.shard_queue import Shard, ShardT, halves_of
from pocl_dist.records import EncodedExample


class CountedShard(Shard, Protocol):
    """A shard of which the speed can be told."""

    def num_tokens(self, method: str) -> int:
        """Returns the input tokens that `method` of the worker takes."""
        ...


CountedT = TypeVar("CountedT", bound=CountedShard)


@dataclass(frozen=True)
class WorkBatch:
    """Rows that go through the model together; `index` is their place among all batches."""

    index: int
    examples: tuple[EncodedExample, ...]
    references: tuple[tuple[str, ...], ...]  # beside the examples
    answers: tuple[str, ...] | None = None  # of a server; None: the worker's model answers
    part: tuple[int, ...] | None = None  # the rows that are asked for; None: all

    @property
    def rows(self) -> Sequence[int]:
        """Returns the rows that are asked for; the others only decide the padding."""
        return range(len(self.examples)) if self.part is None else self.part

    def only(self, rows: Sequence[int]) -> WorkBatch:
        """Returns the batch with these rows asked for."""
        return replace(self, part=tuple(rows))

    def num_tokens(self, method: str) -> int:
        """Returns the input tokens of the asked rows: prompts, with `measure` the responses too."""
        rows = [self.examples[row] for row in self.rows]
        if method == "measure":
            return sum(len(row.token_ids) for row in rows)
        return sum(row.num_prompt_tokens for row in rows)

    @property
    def asked_ids(self) -> list[str]:
        """Returns the ids of the rows that are asked for."""
        return [self.examples[row].example_id for row in self.rows]

    def seed(self, pass_seed: int) -> int:
        """Returns the batch's own seed, so that no two batches of a pass draw the same numbers."""
        return zlib.crc32(f"{pass_seed}/{self.index}".encode())


@dataclass(frozen=True)
class WorkShard:
    """Consecutive batches: the unit that is sent, retried and saved."""

    batches: tuple[WorkBatch, ...]
    seed: int = 0  # of sampled answers

    @property
    def num_rows(self) -> int:
        """Returns the rows of all its batches."""
        return sum(len(batch.rows) for batch in self.batches)

    @property
    def asked_ids(self) -> list[str]:
        """Returns the ids of the rows that are asked for."""
        return [name for batch in self.batches for name in batch.asked_ids]

    def num_tokens(self, method: str) -> int:
        """Returns the input tokens of the rows that are asked for."""
        return sum(batch.num_tokens(method) for batch in self.batches)

    def halves(self) -> list[WorkShard]:
        """Returns the shard in two parts, none when one row is asked for."""
        return [replace(self, batches=part) for part in halves_of(self.batches)]

    @property
    def name(self) -> str:
        """Returns its file's name: that of its first batch, so no two shard layouts can collide."""
        return _name(self.batches[0].index)


def _name(first_batch: int) -> str:
    return f"shard-{first_batch:05d}"


def make_batches(
    examples: Iterable[EncodedExample],
    references: Mapping[str, tuple[str, ...]],
    batch_size: int,
    is_scored: bool = False,
) -> tuple[WorkBatch, ...]:
    """Returns all rows sorted by length, then id, cut into batches; `references` by id.

    The length is that of the prompt; where references are scored, of prompt and response.
    """

    def place(example: EncodedExample) -> tuple[int, str]:
        length = len(example.token_ids) if is_scored else example.num_prompt_tokens
        return length, example.example_id

    rows = sorted(examples, key=place)
    cuts = [tuple(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    return tuple(
        WorkBatch(index, cut, tuple(references[example.example_id] for example in cut))
        for index, cut in enumerate(cuts)
    )


def open_batches(
    batches: Iterable[WorkBatch], done: Set[str], left_out: Set[str] = frozenset()
) -> list[WorkBatch]:
    """Returns the batches with a row that is not done, whole: a part would come out otherwise.

    Only rows of `left_out`, which cannot be worked on, are not asked for.
    """
    found = []
    for batch in batches:
        ids = [row.example_id for row in batch.examples]
        if not all(name in done or name in left_out for name in ids):
            rows = [row for row, name in enumerate(ids) if name not in left_out]
            found.append(batch if len(rows) == len(ids) else batch.only(rows))
    return found


def make_shards(batches: Sequence[WorkBatch], shard_size: int) -> tuple[WorkShard, ...]:
    """Returns shards of at least `shard_size` rows in whole batches, longest rows first.

    So a batch that does not fit into memory shows at once, and the end of the
    pass is made of short work.
    """
    if not batches:
        return ()
    batch_size = max(len(batch.examples) for batch in batches)
    per_shard = -(-shard_size // batch_size)
    cuts = [
        tuple(batches[start : start + per_shard]) for start in range(0, len(batches), per_shard)
    ]
    return tuple(WorkShard(cut) for cut in reversed(cuts))


@dataclass(frozen=True)
class WorkRow:
    """A row and what belongs to it."""

    example: EncodedExample
    references: tuple[str, ...]


class OpenShards(Mapping[str, WorkShard]):
    """The shards with a row that is not done, each made when it is asked for.

    They are those of `make_batches`, `open_batches` and `make_shards`, but no row is held.
    """

    def __init__(
        self,
        row: Callable[[int], WorkRow],
        in_order: np.ndarray,
        num_tokens: np.ndarray,
        batch_size: int,
        shard_size: int,
        is_done: np.ndarray,
        is_left_out: np.ndarray,
    ) -> None:
        """Takes places by length, then id; lengths and masks by place; `row` gives one row."""
        self._row = row
        self._in_order = in_order
        self._batch_size = batch_size
        self._is_left_out = is_left_out
        self._answers: Mapping[str, str] | None = None
        starts = np.arange(0, len(in_order), batch_size)
        is_open = ~np.logical_and.reduceat((is_done | is_left_out)[in_order], starts)
        is_asked = ~is_left_out[in_order]
        num_asked = np.add.reduceat(is_asked.astype(np.int64), starts)
        tokens_asked = np.add.reduceat(np.where(is_asked, num_tokens[in_order], 0), starts)
        batches = np.flatnonzero(is_open)
        per_shard = -(-shard_size // batch_size)
        cuts = [batches[start : start + per_shard] for start in range(0, len(batches), per_shard)]
        self._batches = {_name(int(cut[0])): cut for cut in reversed(cuts)}
        self.sizes = {name: int(num_asked[cut].sum()) for name, cut in self._batches.items()}
        self.tokens = {name: int(tokens_asked[cut].sum()) for name, cut in self._batches.items()}

    def with_answers(self, answers: Mapping[str, str]) -> OpenShards:
        """Takes the answers of a server, by example id, for all rows; returns itself."""
        self._answers = answers
        return self

    def __getitem__(self, name: str) -> WorkShard:
        return WorkShard(tuple(self._batch(int(index)) for index in self._batches[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def _batch(self, index: int) -> WorkBatch:
        start = index * self._batch_size
        places = self._in_order[start : start + self._batch_size]
        rows = [self._row(place) for place in places.tolist()]
        examples = tuple(row.example for row in rows)
        answers = self._answers
        batch = WorkBatch(
            index,
            examples,
            tuple(row.references for row in rows),
            None if answers is None else tuple(answers[row.example_id] for row in examples),
        )
        asked = np.flatnonzero(~self._is_left_out[places])
        return batch if len(asked) == len(rows) else batch.only(asked.tolist())


def sizes_of(shards: Mapping[str, ShardT]) -> Mapping[str, int]:
    """Returns how many rows of each shard are asked for; makes none."""
    if isinstance(shards, OpenShards):
        return shards.sizes
    return {name: shard.num_rows for name, shard in shards.items()}


def tokens_of(shards: Mapping[str, CountedT], name: str, method: str) -> int:
    """Returns the input tokens that `method` of the worker takes of a shard; makes none."""
    if isinstance(shards, OpenShards):
        return shards.tokens[name]
    return shards[name].num_tokens(method)
