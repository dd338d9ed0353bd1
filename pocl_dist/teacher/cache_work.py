"""What the cache pass is cut into: rows of like length go through the teacher together. No torch.

Batches and shards are a function of the rows and two sizes alone, so that the cached values are
the same bits for any number of actors and any interruption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pocl_dist.files import digest_of
from pocl_dist.records import EncodedExample


def content_hash(example: EncodedExample) -> str:
    """Returns a digest of all that a teacher's answer to a row depends on, besides the teacher."""
    return digest_of([example.num_prompt_tokens, *example.token_ids])


@dataclass(frozen=True)
class CacheShard:
    """Rows of one file of the cache, in the batches in which the teacher sees them."""

    index: int  # its place among all shards
    batches: tuple[tuple[EncodedExample, ...], ...]

    @property
    def examples(self) -> tuple[EncodedExample, ...]:
        """Returns its rows in the order in which their positions are stored."""
        return tuple(example for batch in self.batches for example in batch)

    @property
    def num_rows(self) -> int:
        """Returns the rows of all its batches."""
        return sum(len(batch) for batch in self.batches)

    @property
    def num_labels(self) -> int:
        """Returns the label positions of all its rows."""
        return sum(example.num_response_tokens for example in self.examples)

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
    batches = [tuple(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    per_shard = -(-shard_size // batch_size)
    cuts = [
        tuple(batches[start : start + per_shard]) for start in range(0, len(batches), per_shard)
    ]
    return tuple(CacheShard(index, cut) for index, cut in enumerate(cuts))
