"""Bytes of a rank's tensors by part, in each phase of a run: a total is the sum of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pocl_dist.cluster.estimate.activations import activation_bytes, forward_bytes
from pocl_dist.cluster.estimate.setup import Setup
from pocl_dist.cluster.estimate.teacher_memory import (
    is_partitioned,
    teacher_answer,
    teacher_working,
)
from pocl_dist.cluster.estimate.zero_memory import held_state, update_bytes
from pocl_dist.config.chunk_size import tokens_per_chunk

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

_BLOCK_LOGITS = 2**21  # logits of a block on a CPU (losses/blocks.py)


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
    """Returns the phases of distill: the teacher's forward, the loss, the update, answers."""
    held, host = held_state(setup)
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
    phases = [Phase("loss and backward", training | teacher_answer(setup), host)]
    if setup.has_online_teacher:
        assert setup.teacher is not None
        teacher = held["teacher"] + teacher_working(
            setup, setup.teacher, rows * length.num_tokens, is_shared=is_partitioned(setup)
        )
        phases.insert(0, Phase("teacher's forward", {**held, "teacher": teacher}, host))
    phases.append(Phase("update", held | {"buffers": update_bytes(setup)}, host))
    config = setup.config
    has_dev_answers = config.data.dev is not None and config.dev.metric == "rouge_l"
    if has_dev_answers or config.policy.mode != "off":
        answers = held | {"generation": _answer_bytes(setup) + s * setup.student.num_parameters}
        answers["gradients"] = 0 if setup.zero_stage < 3 else held["gradients"]
        phases.append(Phase("student answers", answers, host))
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
        is_shared = config.teacher.cache_engine == "zero3" and setup.world_size > 1
        working = teacher_working(
            setup, setup.teacher, rows * length.num_tokens, is_shared=is_shared
        )
        answers = rows * length.num_labels * setup.teacher.head_hidden * s
        if config.teacher.source == "cache_topk":
            answers += 5 * 64 * 2**20  # teacher/top_k.py
        parts = {"teacher": teacher, "activations": working, "cache": answers}
        phases.append(Phase("cache pass", parts, {}))
    return tuple(phases)


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
    block = min(logits, 4 * _BLOCK_LOGITS) if setup.device.is_cpu else logits
    head = 4 * shape.head_parameters if setup.config.models.student.lora is None else 0
    return models * logits + 2 * block + head + 2 * num_labels * shape.head_hidden * s


def _answer_bytes(setup: Setup) -> int:
    """Returns keys and values of a batch of answers, and the head in fp32 (models/greedy.py)."""
    shape, generation = setup.student, setup.config.generation
    positions = setup.config.data.max_prompt_tokens + generation.max_new_tokens
    keys = 2 * shape.kv * shape.num_layers * setup.dtype_bytes
    logits = 4 * generation.batch_size * setup.vocabulary
    head = 4 * shape.head_parameters if setup.dtype_bytes < 4 else 0
    return generation.batch_size * positions * keys + logits + head
