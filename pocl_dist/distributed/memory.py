"""Bytes per rank of parameters, gradients and optimizer state: by formula, and as held."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pocl_dist.distributed.engine import inner_optimizer

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class HeldBytes:
    """Bytes on one rank; activations and buffers of collectives are not among them."""

    parameters: int
    gradients: int
    optimizer: int


def expected_bytes(num_parameters: int, zero_stage: int, world_size: int) -> HeldBytes:
    """Returns what AdamW in fp32 needs per rank (Rajbhandari et al., arXiv 1910.02054, section 5).

    P parameters of 4 bytes, n ranks, two moments. DeepSpeed 0.19 updates a copy of a rank's part
    also where weights are fp32 already, so the paper's 8 P / n of an fp32 optimizer are 12 P / n:

    stage   parameters   gradients   optimizer
    0       4 P          4 P         8 P
    1       4 P          4 P         12 P / n
    2       4 P          4 P / n     12 P / n
    3       4 P / n      4 P / n     12 P / n
    """
    whole = 4 * num_parameters
    part = -(-whole // world_size)
    if zero_stage == 0:
        return HeldBytes(whole, whole, 2 * whole)
    return HeldBytes(
        parameters=part if zero_stage == 3 else whole,
        gradients=whole if zero_stage == 1 else part,
        optimizer=3 * part,
    )


def held_bytes(engine: DeepSpeedEngine) -> HeldBytes:
    """Returns what the tensors of a student engine take on this rank, each storage counted once.

    Gradients are those between two micro-batches of a step; after the update there are none.
    """
    zero, seen = engine.optimizer, set[int]()
    module_parameters = list(engine.module.parameters())
    partitions = [p.ds_tensor for p in module_parameters if hasattr(p, "ds_tensor")]
    whole = [p.data for p in module_parameters if p.numel() and p.data.numel() > 1]
    parameters = _new_bytes([*partitions, *whole], seen)
    optimizer = inner_optimizer(engine)
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    masters += [*getattr(zero, "fp32_partitioned_groups_flat", [])]
    gradients = [p.grad for p in [*module_parameters, *masters] if p.grad is not None]
    gradients += _tensors([getattr(p, "grad_accum", None) for p in module_parameters])
    for name in ("averaged_gradients", "all_grad_tensors", "grad_partitions_flat_buffer"):
        gradients += _tensors(getattr(zero, name, None))
    num_gradient_bytes = _new_bytes(gradients, seen)
    moments = [*_tensors(list(optimizer.state.values())), *(p.data for p in masters)]
    return HeldBytes(parameters, num_gradient_bytes, _new_bytes(moments, seen))


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """Yields the tensors in nested lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _new_bytes(tensors: Iterable[torch.Tensor], seen: set[int]) -> int:
    """Returns the bytes of storages that are not in `seen` yet, and adds them."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
