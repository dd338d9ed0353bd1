"""Whole parameters of a partitioned module, one at a time. Collective: ranks walk the same list."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from pocl_dist.distributed.engine import inner_optimizer

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Returns whether ZeRO-3 owns the parameter."""
    return hasattr(parameter, "ds_id")


def gathered(parameters: Iterable[nn.Parameter | None]) -> AbstractContextManager[object]:
    """Returns a context where the parameters are whole on every rank; they are not written to."""
    partitioned = [p for p in parameters if p is not None and is_partitioned(p)]
    if not partitioned:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return cast("AbstractContextManager[object]", GatheredParameters(partitioned))


def whole_parameters(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, whole tensor) in the training dtype; the tensor is valid until the next one."""
    for name, parameter in module.named_parameters():
        with gathered([parameter]), torch.no_grad():
            yield name, parameter.detach()


def trained_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields (name, parameter) of what is trained: with LoRA not the base model's weights."""
    yield from ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def master_parameters(engine: DeepSpeedEngine) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, whole fp32 tensor) of the optimizer's master weights: what is trained."""
    from deepspeed.utils import safe_get_full_fp32_param

    for name, parameter in trained_parameters(engine.module):
        whole = safe_get_full_fp32_param(parameter)
        yield name, parameter.detach() if whole is None else whole.view(shape_of(parameter))


def moments(engine: DeepSpeedEngine, key: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, whole fp32 tensor) of one of AdamW's moments."""
    from deepspeed.utils import safe_get_full_optimizer_state

    state = inner_optimizer(engine).state
    for name, parameter in trained_parameters(engine.module):
        if parameter in state:  # no ZeRO: AdamW's keys are the parameters themselves
            yield name, state[parameter][key]
        else:
            whole = safe_get_full_optimizer_state(parameter, key)
            yield name, cast("torch.Tensor", whole).view(shape_of(parameter))


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """Returns the whole parameter's shape, also while it is partitioned."""
    return cast("torch.Size", getattr(parameter, "ds_shape", parameter.shape))


def set_master_parameter(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Sets the optimizer's fp32 copy of a parameter, where there is one."""
    from deepspeed.utils import safe_set_full_fp32_param

    safe_set_full_fp32_param(parameter, value)


def set_weight(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Sets what forward uses of a parameter, in its dtype, from the whole tensor. Collective."""
    if not is_partitioned(parameter):
        parameter.data.copy_(value)
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0):  # rank 0's goes to all
        parameter.data.copy_(value)


def set_moment(
    engine: DeepSpeedEngine, parameter: nn.Parameter, key: str, value: torch.Tensor
) -> None:
    """Sets one of AdamW's moments of a parameter from its whole tensor."""
    from deepspeed.utils import safe_set_full_optimizer_state

    state = inner_optimizer(engine).state
    if parameter in state:
        state[parameter][key].copy_(value)
    else:
        safe_set_full_optimizer_state(parameter, value, key)
