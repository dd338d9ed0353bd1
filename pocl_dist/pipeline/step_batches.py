"""The examples of a global step, and this rank's micro-batches of them."""

from __future__ import annotations

from collections.abc import Sequence

from pocl_dist.curriculum.coordinator import Instruction
from pocl_dist.data.batching import packed_layout, packed_rows, padded_layout
from pocl_dist.data.encoding import collate, collate_packed, pad_id_of
from pocl_dist.data.sampler import StageSampler
from pocl_dist.models.packing import needs_one_row
from pocl_dist.pipeline.training import Training
from pocl_dist.records import Batch, EncodedExample

MAX_PACKED_PADDING = 0.02
"""Padding that packed rows may keep, for attention costs the square of a row's length."""


def sampler_of(training: Training, stage_index: int) -> StageSampler:
    """Returns the sampler of a stage."""
    stage = training.plan.stages[stage_index]
    return StageSampler(
        training.config.seed,
        stage.index,
        stage.num_examples,
        stage.epochs,
        training.config.engine.global_batch_size,
    )


def global_batch(training: Training, instruction: Instruction) -> list[EncodedExample]:
    """Returns the examples of the step, those of all ranks, the same on every rank."""
    positions = sampler_of(training, instruction.stage).batch(instruction.step_in_stage)
    return [training.examples[position] for position in positions]


def micro_batches(training: Training, examples: Sequence[EncodedExample]) -> list[Batch]:
    """Returns this rank's share of a global batch, by the lengths of the examples given.

    Every rank has as many micro-batches; some may hold a dummy only.
    """
    engine, rank, pad_id = training.config.engine, training.rank, pad_id_of(training.tokenizer)
    lengths = [len(example.token_ids) - 1 for example in examples]  # what goes in: all but the last
    if not engine.packing:
        shares = padded_layout(lengths, rank.world_size, engine.micro_batch_size, engine.max_waste)
        return [collate([examples[i] for i in part], pad_id) for part in shares[rank.index]]
    shares = packed_layout(lengths, rank.world_size, engine.micro_batch_size)
    return [
        collate_packed(
            _rows([examples[i] for i in part], needs_one_row(training.module.model)), pad_id
        )
        for part in shares[rank.index]
    ]


def _rows(examples: Sequence[EncodedExample], is_one_row: bool) -> list[list[EncodedExample]]:
    """Returns how the examples of a packed micro-batch lie in rows."""
    if is_one_row or not examples:
        return [list(examples)] if examples else []
    rows = packed_rows([len(example.token_ids) - 1 for example in examples], MAX_PACKED_PADDING)
    return [[examples[i] for i in row] for row in rows]
