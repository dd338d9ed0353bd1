"""What ZeRO leaves on a rank between steps, and the buffers that it works in."""

from __future__ import annotations

from pocl_dist.cluster.estimate.setup import Setup
from pocl_dist.cluster.estimate.teacher_memory import PREFETCH, cache_head, teacher_weights
from pocl_dist.distributed.zero_bytes import expected_bytes

# DeepSpeed 0.19's defaults, in numbers; `engine.zero_options` may set them.
_REDUCE_BUCKET = 5 * 10**8
_REUSE_DISTANCE = 10**9


def held_state(setup: Setup) -> tuple[dict[str, int], dict[str, int]]:
    """Returns what is held between steps on the device, and in host memory."""
    engine, s = setup.config.engine, setup.dtype_bytes
    student = expected_bytes(
        setup.num_parameters,
        setup.zero_stage,
        setup.world_size,
        num_trained=setup.num_trained,
        weight_bytes=s,
        gradient_bytes=2 if setup.dtype == "fp16" else 4,
    )
    device = {
        "parameters": student.parameters,
        "gradients": student.gradients + _whole_gradients(setup),
        "optimizer": student.optimizer,
        "buffers": _bucket_bytes(setup) + _gathered_student(setup),
        "teacher": teacher_weights(setup),
        "cache": cache_head(setup),
    }
    host: dict[str, int] = {}
    if setup.device.is_cpu:  # one memory: nothing is gained
        return device, host
    if engine.offload_optimizer != "none":
        host["optimizer"], device["optimizer"] = device["optimizer"], 0
        if setup.zero_stage > 1:
            host["gradients"], device["gradients"] = device["gradients"], 0
    if engine.offload_param != "none":
        host["parameters"], device["parameters"] = device["parameters"], 0
    if setup.config.teacher.offload_param != "none":
        host["teacher"], device["teacher"] = device["teacher"], 0
    return device, host


def _whole_gradients(setup: Setup) -> int:
    """Returns what ZeRO-2 holds of gradients that only in part belong to the rank.

    In fp32 DeepSpeed 0.19 keeps slices of reduced gradients, and with them their whole storage: on
    the rank where the embedding ends that of the embedding, else of a matrix of a layer.
    """
    is_alone = setup.world_size == 1 or setup.config.models.student.lora is not None
    if is_alone or setup.zero_stage != 2 or setup.dtype != "fp32":
        return 0
    shape, part = setup.student, -(-setup.num_trained // setup.world_size)
    embedding = shape.head_parameters
    before = embedding - embedding % part if embedding > part else 0
    return 4 * (before + shape.hidden * shape.ffn)


def _option(setup: Setup, name: str, default: int) -> int:
    value = setup.config.engine.zero_options.get(name, default)
    return int(value) if isinstance(value, int | float) else default


def _bucket_bytes(setup: Setup) -> int:
    """Returns the buffer in which gradients are gathered for reduction: a fixed size."""
    if setup.zero_stage == 0:
        return 0
    options = setup.config.engine.zero_options
    size = _option(setup, "reduce_bucket_size", _REDUCE_BUCKET)
    # ZeRO-1 reduces the sums, fp32 under bf16; 2 and 3 each micro-batch's gradients as they are.
    is_wide = setup.zero_stage == 1 and setup.dtype == "bf16"
    bytes_each = 4 if is_wide else setup.dtype_bytes
    is_double = options.get("overlap_comm") is True and setup.zero_stage < 3
    return size * bytes_each * (2 if is_double else 1)


def _gathered_student(setup: Setup) -> int:
    """Returns the weights that ZeRO-3 holds whole at the end of the forward pass.

    What backward will use again within the reuse distance stays: half of that distance lies before
    the turn, half behind it.
    """
    if setup.zero_stage < 3:
        return 0
    shape = setup.student
    held = max(shape.layer_matrices, shape.head_parameters)
    held += _option(setup, "stage3_prefetch_bucket_size", PREFETCH)
    held += _option(setup, "stage3_max_reuse_distance", _REUSE_DISTANCE) // 2
    return setup.dtype_bytes * min(shape.num_parameters, held)


def update_bytes(setup: Setup) -> int:
    """Returns the buffers of the update: gradients flattened, or made fp32, once more."""
    whole = 4 * setup.num_trained
    if setup.zero_stage == 0:
        return min(whole, 4 * _REDUCE_BUCKET) if setup.world_size > 1 else 0
    part = -(-whole // setup.world_size)
    return _bucket_bytes(setup) + min(part, 4 * 10**9)  # sub-groups of 1e9 numbers
