"""The examples of a global step, and this rank's micro-batches of them."""

from __future__ import annotations

from collections.abc import Sequence

from pocl_dist.curriculum.coordinator import Instruction
from pocl_dist.data.encoding import collate, pad_id_of
from pocl_dist.data.sampler import StageSampler, micro_batches_of_rank
from pocl_dist.distributed.engine import num_micro_batches
from pocl_dist.pipeline.training import Training
from pocl_dist.records import Batch, EncodedExample


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
    return [training.encoded[training.plan.ranking[position]] for position in positions]


def micro_batches(training: Training, examples: Sequence[EncodedExample]) -> list[Batch]:
    """Returns this rank's share of a global batch; every rank has as many micro-batches."""
    engine, rank = training.config.engine, training.rank
    count = num_micro_batches(engine.global_batch_size, rank.world_size, engine.micro_batch_size)
    shares = micro_batches_of_rank(
        examples, rank.index, rank.world_size, engine.micro_batch_size, count
    )
    return [collate(share, pad_id_of(training.tokenizer)) for share in shares]
