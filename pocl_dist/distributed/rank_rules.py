"""Whether the ranks of a run can share its batch and find their devices. Loads no torch."""

from __future__ import annotations

from pocl_dist.config import Config
from pocl_dist.errors import ConfigError


def num_ranks(config: Config, num_gpus: int) -> int:
    """Returns how many ranks a run on one machine with `num_gpus` visible GPUs has."""
    return config.engine.world_size or max(1, num_gpus)


def check_ranks(config: Config, num_gpus: int) -> None:
    """Raises ConfigError (64) when ranks of one machine lack a GPU or cannot share the batch.

    `num_gpus` is what is visible on it, 0 for the CPU.
    """
    engine, ranks = config.engine, num_ranks(config, num_gpus)
    if num_gpus and ranks > num_gpus:
        raise ConfigError(
            f"engine.world_size: {ranks} ranks, but {num_gpus} GPU(s) are visible; lower it, "
            "or hide the GPUs (CUDA_VISIBLE_DEVICES=) to run on the CPU"
        )
    if num_gpus and engine.zero_stage == 0 and engine.dtype is None:
        raise ConfigError(
            "engine.zero_stage: 0 trains in fp32 only, and engine.dtype null means bf16 on a GPU; "
            "set engine.dtype: fp32, or stage 1, 2 or 3"
        )
    if engine.global_batch_size % ranks:
        raise ConfigError(
            f"engine.global_batch_size: {engine.global_batch_size} rows "
            f"cannot be shared by {ranks} ranks "
            "(one per GPU); use a multiple of them or set engine.world_size"
        )
    if engine.dtype == "fp16" and not num_gpus:
        raise ConfigError("engine.dtype: 'fp16' is not possible on CPU: use fp32 or bf16")
