"""What actors are sent, made when it is asked for."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pocl_dist.data.columns import text_array
from pocl_dist.difficulty.work import (
    OpenShards,
    WorkRow,
    make_batches,
    make_shards,
    open_batches,
    sizes_of,
    tokens_of,
)
from pocl_dist.pipeline.measure import by_length
from pocl_dist.records import EncodedExample


@pytest.mark.parametrize("seed", range(12))
def test_shards_made_on_demand_are_those_of_all_rows_together(seed: int) -> None:
    generator = random.Random(seed)
    rows = [
        EncodedExample(f"r{i:02d}", tuple(range(2 + generator.randrange(5))), 1, False, False)
        for i in generator.sample(range(100), generator.randrange(1, 40))
    ]
    ids = [row.example_id for row in rows]
    answers = {name: f"answer of {name}" for name in ids}
    done, left_out = (set(generator.sample(ids, len(ids) * 2 // n)) for n in (3, 7))
    if seed == 0:
        done = set(ids)
    batch_size, shard_size = generator.choice([(1, 1), (4, 1), (4, 9), (3, 100)])
    batches = make_batches(rows, {name: (name,) for name in ids}, batch_size, is_scored=True)
    expected = make_shards(open_batches(batches, done, left_out), shard_size)
    lengths = np.array([len(row.token_ids) for row in rows])
    shards = OpenShards(
        lambda place: WorkRow(rows[place], (rows[place].example_id,)),
        by_length(lengths, text_array(ids)),
        lengths,
        batch_size,
        shard_size,
        np.array([name in done for name in ids]),
        np.array([name in left_out for name in ids]),
    )
    assert list(shards.items()) == [(shard.name, shard) for shard in expected]
    assert len(shards) == len(expected)
    assert dict(sizes_of(shards)) == {shard.name: shard.num_rows for shard in expected}
    for shard in expected:
        num_tokens = shard.num_tokens("measure")
        assert tokens_of(shards, shard.name, "measure") == num_tokens
        assert tokens_of({shard.name: shard}, shard.name, "measure") == num_tokens
    for shard in shards.with_answers(answers).values():
        for batch in shard.batches:
            assert batch.answers == tuple(answers[row.example_id] for row in batch.examples)
