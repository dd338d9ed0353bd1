"""The gradients that the micro-batches of a step have added up: used for one update, or dropped."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from pocl_dist.distributed.collectives import broadcast_floats
from pocl_dist.distributed.process_group import Rank
from pocl_dist.errors import DivergedError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_SCALE_EXHAUSTED = "Current loss scale already at minimum"


def update(engine: DeepSpeedEngine, rank: Rank) -> float:
    """Clips, takes the AdamW step and returns the global gradient norm before clipping. Collective.

    A norm that is not finite is returned too: then nothing was changed and the gradients are gone.
    Under ZeRO DeepSpeed decides so itself, in every dtype, from the norm over all ranks, before it
    touches a weight; without ZeRO it would take the step, and does not tell the norm.
    """
    if engine.zero_optimization():
        try:
            engine.step()
        except Exception as error:  # DeepSpeed has no class for it
            if _SCALE_EXHAUSTED not in str(error):
                raise
            raise DivergedError(
                "fp16: the gradient overflows at the lowest loss scale too; use engine.dtype: bf16"
            ) from error
        norm = engine.get_global_grad_norm()
        assert norm is not None, "ZeRO computes the norm in every step"
        return float(norm)
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    # Whole and averaged: the same on every rank, but one of them decides.
    norm = broadcast_floats([float(torch.nn.utils.get_total_norm(gradients))], rank)[0]
    if math.isfinite(norm):
        engine.step()
    else:
        drop_gradients(engine)
    return norm


def drop_gradients(engine: DeepSpeedEngine) -> None:
    """Forgets all gradients since the last update, as DeepSpeed does after an fp16 overflow.

    DeepSpeed 0.19 has no call for it: each optimizer adds micro-batches up in buffers of its own
    and starts them anew when its count of micro-batches is back at the start.
    """
    if not engine.zero_optimization():
        engine.zero_grad()
        return
    optimizer = engine.optimizer
    optimizer.zero_grad()  # all that BF16_Optimizer (bf16, ZeRO 1) needs
    if engine.zero_optimization_stage() == 3:
        optimizer._pre_step()
        optimizer._partition_all_parameters()
        optimizer._overflow_clean_up(optimizer.loss_scale)
    elif hasattr(optimizer, "averaged_gradients"):
        from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

        optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
        optimizer._release_preflattened_grad_buffers()
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None
            optimizer.all_grad_tensors[group] = None
        if optimizer.cpu_offload:
            optimizer._offload_accumulated_param_ids = set()
            optimizer.reset_cpu_buffers()
