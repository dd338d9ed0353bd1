"""All that an estimate is made from, in one value."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pocl_dist.cluster.estimate.communication import Cluster
from pocl_dist.cluster.estimate.devices import Device
from pocl_dist.cluster.estimate.layout import StepLayout, largest_micro_batch, step_layout
from pocl_dist.cluster.estimate.shapes import ModelShape
from pocl_dist.cluster.estimate.workload import RowLength, Workload
from pocl_dist.config import Config
from pocl_dist.curriculum.stages import make_stages
from pocl_dist.errors import ConfigError
from pocl_dist.records import Stage

_DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Setup:
    """A config on a cluster: models, rows, devices."""

    config: Config
    student: ModelShape
    teacher: ModelShape | None
    workload: Workload
    device: Device
    cluster: Cluster
    node_size: int  # devices of a whole node; `cluster` may have a part of one

    @property
    def world_size(self) -> int:
        """Returns the ranks."""
        return self.cluster.world_size

    @property
    def dtype(self) -> str:
        """Returns `engine.dtype`, or what null means on this device."""
        return self.config.engine.dtype or ("fp32" if self.device.is_cpu else "bf16")

    @property
    def dtype_bytes(self) -> int:
        """Returns the bytes of a weight or activation."""
        return _DTYPE_BYTES[self.dtype]

    @property
    def zero_stage(self) -> int:
        """Returns `engine.zero_stage`."""
        return self.config.engine.zero_stage

    @property
    def vocabulary(self) -> int:
        """Returns the columns of the logits: no more than the smaller head has."""
        rows = self.student.vocabulary
        return rows if self.teacher is None else min(rows, self.teacher.vocabulary)

    @property
    def has_online_teacher(self) -> bool:
        """Returns whether the teacher runs beside the student."""
        return self.has_teacher and self.config.teacher.source == "online"

    @property
    def has_teacher(self) -> bool:
        """Returns whether a teacher's answers are asked for: in some stage, or on-policy."""
        if self.teacher is None:
            return False
        is_asked = any(stage.kd_ratio > 0 for stage in self.stages)
        return is_asked or self.config.policy.mode != "off"

    @property
    def num_trained(self) -> int:
        """Returns the parameters that are trained: all, or those of the adapters."""
        lora = self.config.models.student.lora
        if lora is None:
            return self.student.num_parameters
        return lora_parameters(self.student, self.config)

    @property
    def num_parameters(self) -> int:
        """Returns the student's parameters, adapters among them."""
        lora = self.config.models.student.lora
        return self.student.num_parameters + (0 if lora is None else self.num_trained)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Returns the stages that `plan` would make of so many rows."""
        config = self.config
        stages = make_stages(
            self.workload.num_rows, config.curriculum, config.engine.global_batch_size
        )
        if config.models.teacher is None:
            return tuple(replace(stage, temperature=1.0, kd_ratio=0.0) for stage in stages)
        return stages

    @property
    def layout(self) -> StepLayout:
        """Returns a mean step of one rank."""
        return step_layout(self.config, self.workload, self.world_size)

    @property
    def largest(self) -> tuple[int, RowLength]:
        """Returns rows and length of the largest micro-batch."""
        return largest_micro_batch(self.config, self.workload, self.world_size)

    def with_engine(self, **changes: object) -> Setup:
        """Returns the setup with other keys under `engine`."""
        engine = self.config.engine.model_copy(update=changes)
        return replace(self, config=self.config.model_copy(update={"engine": engine}))

    def with_teacher(self, **changes: object) -> Setup:
        """Returns the setup with other keys under `teacher`."""
        teacher = self.config.teacher.model_copy(update=changes)
        return replace(self, config=self.config.model_copy(update={"teacher": teacher}))

    def with_world(self, world_size: int) -> Setup:
        """Returns the setup on so many devices: whole nodes, or a part of one."""
        per_node = min(world_size, self.node_size)
        if world_size % per_node:
            raise ConfigError(f"{world_size} ranks are not whole nodes of {per_node}")
        cluster = replace(self.cluster, num_nodes=world_size // per_node, devices_per_node=per_node)
        return replace(self, cluster=cluster)


def lora_parameters(shape: ModelShape, config: Config) -> int:
    """Returns the parameters of adapters beside the linear layers: rank * (inputs + outputs).

    With `target_modules` the names decide, as far as they are those of Llama and its kin; the sum
    over all linear layers is an upper bound for others.
    """
    lora = config.models.student.lora
    assert lora is not None
    h, f = shape.hidden, shape.ffn
    sides = {
        "q_proj": h + shape.query,
        "k_proj": h + shape.kv,
        "v_proj": h + shape.kv,
        "o_proj": h + shape.query,
        "up_proj": h + f,
        "down_proj": h + f,
    }
    if shape.family.is_gated:
        sides["gate_proj"] = h + f
    if lora.target_modules is not None:
        chosen = {name.rpartition(".")[2] for name in lora.target_modules}
        if chosen <= set(sides):
            sides = {name: size for name, size in sides.items() if name in chosen}
    return lora.rank * sum(sides.values()) * shape.num_layers
