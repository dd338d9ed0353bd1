"""Bytes of parameters, gradients and optimizer state that a student engine holds on this rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from pocl_dist.distributed.engine import inner_optimizer
from pocl_dist.distributed.zero_bytes import HeldBytes

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


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
