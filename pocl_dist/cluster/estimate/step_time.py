"""Seconds of an optimizer step by part: products, element-wise work, communication, update."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pocl_dist.cluster.estimate.communication import (
    all_gather_seconds,
    all_reduce_seconds,
    reduce_scatter_seconds,
)
from pocl_dist.cluster.estimate.flops import Work, step_work
from pocl_dist.cluster.estimate.layout import StepLayout
from pocl_dist.cluster.estimate.setup import Setup

# DeepSpeed gathers a weight when its module runs, and so many modules of a layer have some.
_MODULES_PER_LAYER = 7
_ADAM_BYTES = 28  # weight, gradient, two moments read; weight and moments written, fp32
# Its hooks around every module of a partitioned model, in Python: measured, CPU time per gather.
_HOOK_SECONDS = 2e-4


@dataclass(frozen=True)
class StepTime:
    """Seconds of one rank's step; communication is what computation does not hide."""

    teacher: float
    student: float
    loss: float
    communication: float
    update: float
    overhead: float  # operators that are started more slowly than they run

    @property
    def total(self) -> float:
        """Returns the seconds of the step."""
        return sum(float(getattr(self, field.name)) for field in fields(self))


def step_time(setup: Setup, layout: StepLayout | None = None) -> StepTime:
    """Returns the time of a mean step."""
    layout = setup.layout if layout is None else layout
    work, device = step_work(setup, layout), setup.device
    rate = device.flops[setup.dtype] * device.product_efficiency
    teacher = work.teacher_flops / rate + work.teacher_bytes / device.bytes_per_second
    student = work.student_flops / rate + work.student_bytes / device.bytes_per_second
    loss = work.loss_flops / rate + work.num_logits * device.logit_seconds
    computing = teacher + student + loss
    hooks = _hook_seconds(setup, layout)
    starting = work.num_operators * device.op_seconds
    # A device that can works while Python starts what comes next.
    hidden = computing if device.overlaps else 0.0
    overhead = max(0.0, starting + hooks - hidden)
    return StepTime(
        teacher=teacher,
        student=student,
        loss=loss,
        communication=_exposed_seconds(setup, layout, work, computing),
        update=_update_seconds(setup),
        overhead=overhead,
    )


# ------------------------------------------------------------------------------------ communication


def _num_gathers(setup: Setup, num_layers: int) -> float:
    return num_layers * _MODULES_PER_LAYER + 2


def _student_seconds(setup: Setup, layout: StepLayout) -> float:
    """Returns the time of the student's collectives in a step.

    Stage 0 and 1 reduce once per step, 2 and 3 after every micro-batch; 0 to 2 all-reduce
    (DeepSpeed 0.19 all-reduces a bucket, then keeps its part), 1 and 2 gather what was updated, 3
    gathers before forward, again before backward what it let go, and reduce-scatters.
    """
    cluster, s, count = setup.cluster, setup.dtype_bytes, layout.num_micro_batches
    trained, every = setup.num_trained, setup.num_parameters
    if setup.zero_stage == 0:
        return all_reduce_seconds(4 * trained, cluster)
    updated = all_gather_seconds(s * trained, cluster)
    if setup.zero_stage == 1:
        return all_reduce_seconds(4 * trained, cluster) + updated
    if setup.zero_stage == 2:
        return count * all_reduce_seconds(s * trained, cluster) + updated
    gathers = _num_gathers(setup, setup.student.num_layers)
    return count * (
        all_gather_seconds(s * every, cluster, gathers)
        + all_gather_seconds(s * _let_go(setup), cluster, gathers)
        + reduce_scatter_seconds(s * trained, cluster, gathers)
    )


def _let_go(setup: Setup) -> int:
    """Returns the parameters that are gathered twice: those beyond half the reuse distance."""
    return max(0, setup.num_parameters - 5 * 10**8)


def _teacher_seconds(setup: Setup, layout: StepLayout) -> float:
    if not setup.has_online_teacher or setup.world_size == 1:
        return 0.0
    assert setup.teacher is not None
    gathers = _num_gathers(setup, setup.teacher.num_layers)
    num_bytes = setup.dtype_bytes * setup.teacher.num_parameters
    return layout.num_micro_batches * all_gather_seconds(num_bytes, setup.cluster, gathers)


def _copied_bytes(setup: Setup, layout: StepLayout) -> float:
    """Returns what ZeRO copies into new memory: every gathered or reduced number twice.

    Once into the buffer of the collective, once out of it. A GPU does this at the speed of its
    memory, behind the computation.
    """
    count, s = layout.num_micro_batches, setup.dtype_bytes
    trained, total = setup.num_trained, 0.0
    if setup.zero_stage == 3:
        total += 2 * count * s * (setup.num_parameters + trained)
    elif setup.zero_stage == 2:
        total += 2 * count * s * trained + s * trained
    elif setup.zero_stage == 1:
        total += (2 * 4 + s) * trained
    elif setup.world_size > 1:
        total += 2 * 4 * trained
    if setup.has_online_teacher and setup.world_size > 1:
        assert setup.teacher is not None
        total += 2 * count * s * setup.teacher.num_parameters
    return total


def _offload_seconds(setup: Setup, layout: StepLayout) -> float:
    """Returns the time of copies between host and device memory."""
    if setup.device.is_cpu:
        return 0.0
    engine, s, world = setup.config.engine, setup.dtype_bytes, setup.world_size
    count = layout.num_micro_batches
    num_bytes = 0.0
    if engine.offload_optimizer != "none":  # gradients there, weights back
        num_bytes += (4 + s) * setup.num_trained / world
    if engine.offload_param != "none":
        num_bytes += 2 * count * s * setup.num_parameters / world
    if setup.config.teacher.offload_param != "none" and setup.has_online_teacher:
        assert setup.teacher is not None
        num_bytes += count * s * setup.teacher.num_parameters / world
    return num_bytes / setup.device.host_bytes_per_second


def _exposed_seconds(setup: Setup, layout: StepLayout, work: Work, computing: float) -> float:
    """Returns the communication that is waited for.

    ZeRO-3 gathers ahead on a stream of its own: on a device that can, student and teacher hide it
    behind their work. Stages 0 to 2 reduce in the way (`overlap_comm` is off for them).
    """
    student, teacher = _student_seconds(setup, layout), _teacher_seconds(setup, layout)
    copies = _offload_seconds(setup, layout)
    if not setup.device.overlaps:
        rate = setup.device.copy_bytes_per_second or setup.device.bytes_per_second
        return student + teacher + copies + _copied_bytes(setup, layout) / rate
    share = work.teacher_flops / work.flops if work.flops else 0.0
    hidden_teacher = min(teacher, share * computing)
    hidden_student = min(student, (1 - share) * computing) if setup.zero_stage == 3 else 0.0
    return student - hidden_student + teacher - hidden_teacher + copies


def _hook_seconds(setup: Setup, layout: StepLayout) -> float:
    """Returns the time of DeepSpeed's hooks; a model that is not partitioned has none."""
    gathers = 0.0
    if setup.zero_stage == 3:
        gathers += 3 * _num_gathers(setup, setup.student.num_layers)
    if setup.has_online_teacher and setup.world_size > 1:
        assert setup.teacher is not None
        gathers += _num_gathers(setup, setup.teacher.num_layers)
    return layout.num_micro_batches * gathers * _HOOK_SECONDS


def _update_seconds(setup: Setup) -> float:
    """Returns AdamW's time: bound by memory; on the host it is the host's memory."""
    part = setup.num_trained / (1 if setup.zero_stage == 0 else setup.world_size)
    bandwidth = setup.device.bytes_per_second
    if setup.config.engine.offload_optimizer != "none" and not setup.device.is_cpu:
        bandwidth = setup.device.host_bytes_per_second  # about a socket's share of a rank, too
    return _ADAM_BYTES * part / bandwidth
