"""What the cache pass is cut into: rows of like length go through the teacher together. No torch.

Batches and shards are a function of the rows and two sizes alone, so that the cached values are
the same bits for any number of actors and any interruption.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

from pocl_dist.distributed.shard_queue import halves_of
from pocl_dist.files import digest_of
from pocl_dist.records import EncodedExample


def content_hash(example: EncodedExample) -> str:
    """Returns a digest of all that a teacher's answer to a row depends on, besides the teacher."""
    return digest_of([example.num_prompt_tokens, *example.token_ids])


@dataclass(frozen=True)
class CacheBatch:
    """Rows that the teacher sees together."""

    examples: tuple[EncodedExample, ...]
    part: tuple[int, ...] | None = None  # the rows that are asked for; None: all

    @property
    def rows(self) -> Sequence[int]:
        """Returns the rows that are asked for; the others only decide the padding."""
        return range(len(self.examples)) if self.part is None else self.part

    def only(self, rows: Sequence[int]) -> CacheBatch:
        """Returns the batch with these rows asked for."""
        return replace(self, part=tuple(rows))

    @property
    def asked(self) -> tuple[EncodedExample, ...]:
        """Returns the rows that are asked for."""
        return tuple(self.examples[row] for row in self.rows)


@dataclass(frozen=True)
class CacheShard:
    """Rows of one file of the cache, in the batches in which the teacher sees them."""

    index: int  # its place among all shards
    batches: tuple[CacheBatch, ...]

    @property
    def examples(self) -> tuple[EncodedExample, ...]:
        """Returns its rows in the order in which their positions are stored."""
        return tuple(example for batch in self.batches for example in batch.asked)

    def num_tokens(self, method: str) -> int:
        """Returns the tokens of its rows."""
        return sum(len(example.token_ids) for example in self.examples)

    @property
    def num_rows(self) -> int:
        """Returns the rows of all its batches."""
        return sum(len(batch.rows) for batch in self.batches)

    def halves(self) -> list[CacheShard]:
        """Returns the shard in two parts, none when one row is asked for."""
        return [replace(self, batches=part) for part in halves_of(self.batches)]

    @property
    def num_labels(self) -> int:
        """Returns the label positions of all its rows."""
        return sum(example.num_response_tokens for example in self.examples)

    def without(self, ids: Set[str]) -> CacheShard:
        """Returns the shard with these rows not asked for."""
        if not ids:
            return self
        parts = [
            batch.only([row for row in batch.rows if batch.examples[row].example_id not in ids])
            for batch in self.batches
        ]
        return replace(self, batches=tuple(batch for batch in parts if batch.rows))

    @property
    def name(self) -> str:
        """Returns its files' stem; the rows are part of it, so no two layouts can collide."""
        rows = digest_of([[row.example_id, content_hash(row)] for row in self.examples])
        return f"shard-{self.index:05d}-{rows[:12]}"


def make_cache_shards(
    examples: Sequence[EncodedExample], batch_size: int, shard_size: int
) -> tuple[CacheShard, ...]:
    """Returns shards of at least `shard_size` rows in whole batches, longest rows first.

    So little is padded, and a batch that does not fit into memory shows at once.
    """
    rows = sorted(examples, key=lambda row: (-len(row.token_ids), row.example_id))
    batches = [
        CacheBatch(tuple(rows[start : start + batch_size]))
        for start in range(0, len(rows), batch_size)
    ]
    per_shard = -(-shard_size // batch_size)
    cuts = [
        tuple(batches[start : start + per_shard]) for start in range(0, len(batches), per_shard)
    ]
    return tuple(CacheShard(index, cut) for index, cut in enumerate(cuts))
