"""Config -> DeepSpeed: the student's engine and the teacher's, and AdamW's state inside them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from pocl_dist.config import Config
from pocl_dist.distributed.process_group import Rank, torch_dtype
from pocl_dist.errors import ConfigError
from pocl_dist.files import JSONValue

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MOMENTS = ("exp_avg", "exp_avg_sq")
_NEVER = 10**12
# Of DeepSpeed's DynamicLossScaler: the scale grows after so many steps without overflow.
_LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def num_micro_batches(global_batch_size: int, world_size: int, micro_batch_size: int) -> int:
    """Returns the fewest forward passes of every rank per optimizer step.

    Raises ConfigError when rows cannot be shared.
    """
    if global_batch_size % world_size:
        raise ConfigError(
            f"engine.global_batch_size: {global_batch_size} rows cannot be shared "
            f"by {world_size} ranks; use a multiple of them"
        )
    return math.ceil(global_batch_size / world_size / micro_batch_size)


def _precision(dtype: torch.dtype) -> dict[str, JSONValue]:
    if dtype == torch.bfloat16:
        # Without the check ZeRO 1 and 2 would take an update whose gradient is NaN.
        bf16: dict[str, JSONValue] = {"enabled": True, "check_grad_overflow": True}
        return {"bf16": bf16, "data_types": {"grad_accum_dtype": "fp32"}}
    return {"fp16": {"enabled": True, "initial_scale_power": 16}} if dtype == torch.float16 else {}


def _common(config: Config, rank: Rank) -> dict[str, JSONValue]:
    engine = config.engine
    fewest = num_micro_batches(engine.global_batch_size, rank.world_size, engine.micro_batch_size)
    return {
        "train_micro_batch_size_per_gpu": engine.micro_batch_size,
        # The most there can be; how many there are is told in every step.
        "gradient_accumulation_steps": 2 * fewest,
        "steps_per_print": _NEVER,
        **_precision(torch_dtype(engine.dtype, rank.device)),
    }


def student_engine_config(config: Config, rank: Rank) -> dict[str, JSONValue]:
    """Returns the DeepSpeed config of the student."""
    engine = config.engine
    zero: dict[str, JSONValue] = {"stage": engine.zero_stage}
    if engine.offload_optimizer != "none":
        zero["offload_optimizer"] = {
            "device": engine.offload_optimizer,
            "pin_memory": rank.device.type == "cuda",
        }
    if engine.offload_param != "none":
        zero["offload_param"] = {
            "device": engine.offload_param,
            "pin_memory": rank.device.type == "cuda",
        }
    return {
        **_common(config, rank),
        "zero_optimization": zero | engine.zero_options,
        "gradient_clipping": config.optimizer.grad_clip,
        # torch's AdamW on offloaded state: the compiled CPU Adam is asked for
        # below where there is a GPU.
        "zero_force_ds_cpu_optimizer": False,
    }


def teacher_engine_config(config: Config, rank: Rank) -> dict[str, JSONValue]:
    """Returns the DeepSpeed config of the frozen teacher: ZeRO-3 without optimizer."""
    zero: dict[str, JSONValue] = {"stage": 3}
    if config.teacher.offload_param != "none":
        zero["offload_param"] = {
            "device": config.teacher.offload_param,
            "pin_memory": rank.device.type == "cuda",
        }
    return {**_common(config, rank), "zero_optimization": zero}


def _adamw(module: nn.Module, config: Config, rank: Rank) -> torch.optim.Optimizer:
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trained if p.ndim >= 2],
            "weight_decay": config.optimizer.weight_decay,
        },
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    beta1, beta2 = config.optimizer.betas
    # lr 0: ZeRO-3 takes one step with zero gradients to allocate the moments; it
    # must not decay weights.
    if config.engine.offload_optimizer != "none" and rank.device.type == "cuda":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return cast(
            "torch.optim.Optimizer",
            DeepSpeedCPUAdam(groups, lr=0.0, betas=(beta1, beta2), eps=config.optimizer.eps),
        )
    # One pass over weights, gradients and moments instead of ten: 5 times faster on a CPU.
    return torch.optim.AdamW(
        groups, lr=0.0, betas=(beta1, beta2), eps=config.optimizer.eps, fused=True
    )


def build_student_engine(module: nn.Module, config: Config, rank: Rank) -> DeepSpeedEngine:
    """Returns the engine that trains `module`, AdamW's state empty, learning rate 0. Collective."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if (
        config.engine.zero_stage == 0
        and torch_dtype(config.engine.dtype, rank.device) != torch.float32
    ):
        raise ConfigError(
            "engine.zero_stage: 0 trains in fp32 only; use stage 1, 2 or 3 "
            "with engine.dtype bf16 or fp16"
        )
    optimizer = _adamw(module, config, rank)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config=student_engine_config(config, rank),
        dist_init_required=False,
    )
    engine = cast("DeepSpeedEngine", engine)
    _allocate_moments(engine)
    reset_optimizer(engine)
    return engine


def _allocate_moments(engine: DeepSpeedEngine) -> None:
    """Creates AdamW's moments, zero, before the first step would, so that they can be set.

    Also goes around a fault of DeepSpeed 0.19: ZeRO 1 and 2 link parameters to moments after the
    first group's step, when those of the second group do not exist yet.
    """
    optimizer = inner_optimizer(engine)
    # ZeRO-3 keys the state by its flat partitions, which are in no parameter group between steps.
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    parameters = flat or [
        parameter for group in optimizer.param_groups for parameter in group["params"]
    ]
    for parameter in parameters:
        if not optimizer.state[parameter]:
            moments = {key: torch.zeros_like(parameter, requires_grad=False) for key in MOMENTS}
            is_torch = isinstance(optimizer, torch.optim.AdamW)
            step = torch.tensor(0.0, device=parameter.device) if is_torch else 0
            optimizer.state[parameter] = {"step": step, **moments}
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        link()


def inner_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """Returns the AdamW inside DeepSpeed's ZeRO wrapper."""
    optimizer = engine.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return cast("torch.optim.Optimizer", optimizer)


def _adam_states(engine: DeepSpeedEngine) -> Iterator[dict[str, object]]:
    yield from (
        cast("dict[str, object]", state) for state in inner_optimizer(engine).state.values()
    )


def reset_optimizer(engine: DeepSpeedEngine) -> None:
    """Sets AdamW's moments and step count to zero: the state of a new optimizer."""
    for state in _adam_states(engine):
        for key in MOMENTS:
            if isinstance(moment := state.get(key), torch.Tensor):
                moment.zero_()
    set_adam_step(engine, 0)


def adam_step(engine: DeepSpeedEngine) -> int:
    """Returns AdamW's step count, which its bias correction uses; 0 before the first step."""
    return max((int(cast("float", state["step"])) for state in _adam_states(engine)), default=0)


def set_adam_step(engine: DeepSpeedEngine, step: int) -> None:
    """Sets AdamW's step count."""
    for state in _adam_states(engine):
        counter = state["step"]
        if isinstance(counter, torch.Tensor):
            counter.fill_(step)
        else:
            state["step"] = step


def loss_scale_state(engine: DeepSpeedEngine) -> dict[str, JSONValue] | None:
    """Returns the scale of fp16 and what its next change depends on; None in another dtype."""
    scaler = getattr(engine.optimizer, "loss_scaler", None) if engine.fp16_enabled() else None
    return None if scaler is None else {key: getattr(scaler, key) for key in _LOSS_SCALE}


def set_loss_scale_state(engine: DeepSpeedEngine, state: Mapping[str, JSONValue]) -> None:
    """Sets what `loss_scale_state` returned."""
    for key in _LOSS_SCALE:
        setattr(engine.optimizer.loss_scaler, key, state[key])


def set_learning_rate(engine: DeepSpeedEngine, learning_rate: float) -> None:
    """Sets the learning rate of all parameter groups."""
    for group in inner_optimizer(engine).param_groups:
        group["lr"] = learning_rate


def learning_rate_of(engine: DeepSpeedEngine) -> float:
    """Returns the learning rate the next step will use."""
    return float(inner_optimizer(engine).param_groups[0]["lr"])
