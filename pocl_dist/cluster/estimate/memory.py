"""Bytes of a rank's tensors by part, in each phase of a run: a total is the sum of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pocl_dist.cluster.estimate.activations import activation_bytes, forward_bytes
from pocl_dist.cluster.estimate.setup import Setup
from pocl_dist.cluster.estimate.shapes import ModelShape
from pocl_dist.config.chunk_size import tokens_per_chunk
from pocl_dist.distributed.zero_bytes import expected_bytes

PARTS = (
    "parameters",
    "gradients",
    "optimizer",
    "buffers",
    "activations",
    "logit chunks",
    "teacher",
    "cache",
    "generation",
)
"""`buffers`: what ZeRO gathers and reduces in; `cache`: what is read of the teacher's cache;
`generation`: keys, values and a whole copy of the weights while answers are written."""

# DeepSpeed 0.19's defaults, in numbers; `engine.zero_options` may set them.
_REDUCE_BUCKET = 5 * 10**8
_PREFETCH = 5 * 10**7
_REUSE_DISTANCE = 10**9
_FREE_LOGITS = 2**21  # logits of a block on a CPU (losses/blocks.py)


@dataclass(frozen=True)
class Phase:
    """What a rank holds at one time; parts that it does not hold are left out."""

    name: str
    parts: Mapping[str, int]
    host: Mapping[str, int]  # of it in host memory, where an accelerator has its own

    @property
    def total(self) -> int:
        """Returns the bytes on the device."""
        return sum(self.parts.values())

    @property
    def host_total(self) -> int:
        """Returns the bytes in host memory."""
        return sum(self.host.values())


def training_phases(setup: Setup) -> tuple[Phase, ...]:
    """Returns the phases of distill: the teacher's forward, the loss, the update, dev answers."""
    held, host = _state(setup)
    rows, length = setup.largest
    shape, s = setup.student, setup.dtype_bytes
    training = {
        **held,
        "activations": activation_bytes(
            shape,
            rows,
            length.num_tokens,
            s,
            is_checkpointed=setup.config.engine.gradient_checkpointing,
            is_cpu=setup.device.is_cpu,
        ),
        "logit chunks": _loss_bytes(setup, rows * length.num_labels),
    }
    phases = [Phase("loss and backward", training | _teacher_answer(setup), host)]
    if setup.has_online_teacher:
        assert setup.teacher is not None
        working = forward_bytes(setup.teacher, rows * length.num_tokens, s)
        working += _gathered(setup, setup.teacher, is_trained=False)
        teacher = held["teacher"] + working
        phases.insert(0, Phase("teacher's forward", {**held, "teacher": teacher}, host))
    phases.append(Phase("update", held | {"buffers": _update_bytes(setup)}, host))
    if setup.config.data.dev is not None and setup.config.dev.metric == "rouge_l":
        answers = held | {"generation": _answer_bytes(setup) + s * setup.student.num_parameters}
        answers["gradients"] = 0 if setup.zero_stage < 3 else held["gradients"]
        phases.append(Phase("dev answers", answers, host))
    return tuple(phases)


def pass_phases(setup: Setup) -> tuple[Phase, ...]:
    """Returns what an actor of measure and of the cache pass holds; weights whole on its devices.

    The student is scored in its own dtype; `teacher.devices_per_actor` share a teacher's layers.
    """
    config, s = setup.config, setup.dtype_bytes
    rows, length = config.generation.batch_size, setup.workload.longest
    weights = {"parameters": s * setup.student.num_parameters}
    scoring = forward_bytes(setup.student, max(4096, length.num_tokens), s)
    phases = []
    if config.curriculum.num_stages > 1 and config.curriculum.ordering != "shuffled":
        parts = weights | {"activations": scoring, "generation": _answer_bytes(setup)}
        phases.append(Phase("measure", parts, {}))
    if setup.has_teacher and config.teacher.source != "online":
        assert setup.teacher is not None
        devices = config.teacher.devices_per_actor
        if config.teacher.cache_engine == "zero3":
            devices = setup.world_size
        rows = config.teacher.cache_batch_size
        teacher = -(-s * setup.teacher.num_parameters // devices)
        working = forward_bytes(setup.teacher, rows * length.num_tokens, s)
        if config.teacher.cache_engine == "zero3" and setup.world_size > 1:
            working += _gathered(setup, setup.teacher, is_trained=False)
        answers = rows * length.num_labels * setup.teacher.head_hidden * s
        if config.teacher.source == "cache_topk":
            answers += 5 * 64 * 2**20  # teacher/top_k.py
        parts = {"teacher": teacher, "activations": working, "cache": answers}
        phases.append(Phase("cache pass", parts, {}))
    return tuple(phases)


# ---------------------------------------------------------------------------------- what always lies


def _state(setup: Setup) -> tuple[dict[str, int], dict[str, int]]:
    """Returns what is held between steps on the device, and in host memory."""
    engine, s = setup.config.engine, setup.dtype_bytes
    student = expected_bytes(
        setup.num_parameters,
        setup.zero_stage,
        setup.world_size,
        num_trained=setup.num_trained,
        weight_bytes=s,
    )
    device = {
        "parameters": student.parameters,
        "gradients": student.gradients,
        "optimizer": student.optimizer,
        "buffers": _bucket_bytes(setup) + _gathered_student(setup),
        "teacher": _teacher_weights(setup),
        "cache": _cache_head(setup),
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


def _option(setup: Setup, name: str, default: int) -> int:
    value = setup.config.engine.zero_options.get(name, default)
    return int(value) if isinstance(value, int | float) else default


def _bucket_bytes(setup: Setup) -> int:
    """Returns the buffer in which gradients are gathered for reduction: a fixed size."""
    if setup.zero_stage == 0:
        return 0
    options = setup.config.engine.zero_options
    size = _option(setup, "reduce_bucket_size", _REDUCE_BUCKET)
    # ZeRO-1 reduces the fp32 sums, 2 and 3 each micro-batch's gradients in their own dtype.
    bytes_each = 4 if setup.zero_stage == 1 else setup.dtype_bytes
    is_double = options.get("overlap_comm") is True and setup.zero_stage < 3
    return size * bytes_each * (2 if is_double else 1)


def _gathered_student(setup: Setup) -> int:
    """Returns the weights that ZeRO-3 holds whole at the end of the forward pass."""
    if setup.zero_stage < 3:
        return 0
    return _gathered(setup, setup.student, is_trained=True)


def _gathered(setup: Setup, shape: ModelShape, *, is_trained: bool) -> int:
    """Returns the bytes of gathered weights.

    What backward will use again within the reuse distance stays: half of that distance lies before
    the turn, half behind it. A frozen model uses each weight once and holds what is prefetched.
    """
    held = max(shape.layer_matrices, shape.head_parameters) + _PREFETCH
    if is_trained:  # the teacher's engine has no options
        held += _option(setup, "stage3_prefetch_bucket_size", _PREFETCH) - _PREFETCH
        held += _option(setup, "stage3_max_reuse_distance", _REUSE_DISTANCE) // 2
    return setup.dtype_bytes * min(shape.num_parameters, held)


# ------------------------------------------------------------------------------------ teacher, cache


def _teacher_weights(setup: Setup) -> int:
    """Returns the online teacher's weights: whole on one rank, else a part."""
    if not setup.has_online_teacher:
        return 0
    assert setup.teacher is not None
    return -(-setup.dtype_bytes * setup.teacher.num_parameters // setup.world_size)


def _is_partitioned(setup: Setup) -> bool:
    return setup.world_size > 1 or setup.config.teacher.offload_param != "none"


def _cache_head(setup: Setup) -> int:
    """Returns the teacher's head, which a cache of hidden states needs whole on every rank."""
    if not setup.has_teacher or setup.config.teacher.source != "cache_hidden":
        return 0
    assert setup.teacher is not None
    return setup.dtype_bytes * setup.teacher.head_parameters


def _teacher_answer(setup: Setup) -> dict[str, int]:
    """Returns parts with what a teacher's answer to a micro-batch takes while the loss is formed."""
    if not setup.has_teacher:
        return {}
    assert setup.teacher is not None
    rows, length = setup.largest
    labels, s = rows * length.num_labels, setup.dtype_bytes
    wide = setup.teacher.head_hidden
    source = setup.config.teacher.source
    if source == "online":
        answer = s * wide * (rows * length.num_tokens + labels)
        head = s * setup.teacher.head_parameters if _is_partitioned(setup) else 0
        weights = 0 if _is_offloaded(setup) else _teacher_weights(setup)
        return {"teacher": weights + answer + head}
    if source == "cache_hidden":
        return {"cache": _cache_head(setup) + s * wide * labels}
    return {"cache": labels * (12 * setup.config.teacher.top_k + 4)}  # ids as 8 bytes


def _is_offloaded(setup: Setup) -> bool:
    return setup.config.teacher.offload_param != "none" and not setup.device.is_cpu


# --------------------------------------------------------------------------------------- transients


def _loss_bytes(setup: Setup, num_labels: int) -> int:
    """Returns what the loss holds: a chunk's logits, its gradients until backward takes them."""
    shape, s = setup.student, setup.dtype_bytes
    if setup.config.loss.full_logits:
        copies = 4 if setup.has_teacher else 3
        return copies * 4 * num_labels * setup.vocabulary
    chunk = tokens_per_chunk(
        setup.config.loss.chunk_tokens, setup.vocabulary, is_cpu=setup.device.is_cpu
    )
    logits = 4 * min(chunk, num_labels) * setup.vocabulary
    models = 2 if setup.has_teacher else 1
    # The element-wise part: a block at a time on a CPU, the whole chunk on an accelerator.
    block = min(logits, 4 * _FREE_LOGITS) if setup.device.is_cpu else logits
    head = 4 * shape.head_parameters if setup.config.models.student.lora is None else 0
    return models * logits + 2 * block + head + 2 * num_labels * shape.head_hidden * s


def _update_bytes(setup: Setup) -> int:
    """Returns the buffers of the update: gradients flattened, or made fp32, once more."""
    whole = 4 * setup.num_trained
    if setup.zero_stage == 0:
        return min(whole, 4 * _REDUCE_BUCKET) if setup.world_size > 1 else 0
    part = -(-whole // setup.world_size)
    return _bucket_bytes(setup) + min(part, 4 * 10**9)  # sub-groups of 1e9 numbers


def _answer_bytes(setup: Setup) -> int:
    """Returns keys and values of a batch of answers, and the head in fp32 (models/greedy.py)."""
    shape, generation = setup.student, setup.config.generation
    positions = setup.config.data.max_prompt_tokens + generation.max_new_tokens
    keys = 2 * shape.kv * shape.num_layers * setup.dtype_bytes
    logits = 4 * generation.batch_size * setup.vocabulary
    head = 4 * shape.head_parameters if setup.dtype_bytes < 4 else 0
    return generation.batch_size * positions * keys + logits + head
