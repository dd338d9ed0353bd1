"""The config: its sections hold every key with type, bounds, default (only there) and meaning.

All models are frozen and strict: an unknown key, a string where a number belongs, or a value out of
range is an error. What a key promises works, or is refused; there are no keys for later.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pocl_dist.config.curriculum_sections import CurriculumConfig, DevConfig
from pocl_dist.config.input_sections import DataConfig, ModelsConfig
from pocl_dist.config.launch_sections import LaunchConfig
from pocl_dist.config.pass_sections import (
    EvaluateConfig,
    GenerateConfig,
    GenerationConfig,
    MeasureConfig,
    RayConfig,
    ReportConfig,
)
from pocl_dist.config.section import Section, Text
from pocl_dist.config.training_sections import (
    CheckpointConfig,
    EngineConfig,
    ExportConfig,
    LogConfig,
    LossConfig,
    NonFiniteConfig,
    OptimizerConfig,
    PolicyConfig,
    ResumeConfig,
    RunConfig,
    TeacherConfig,
)


class Config(Section):
    """All keys of a run."""

    run_dir: Text
    """Folder of everything the run writes; the same command on it continues."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    """Order of examples, shuffled ordering, initialisation."""
    models: ModelsConfig
    data: DataConfig
    curriculum: CurriculumConfig = CurriculumConfig()
    dev: DevConfig = DevConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    generation: GenerationConfig = GenerationConfig()
    measure: MeasureConfig = MeasureConfig()
    generate: GenerateConfig = GenerateConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()
    teacher: TeacherConfig = TeacherConfig()
    policy: PolicyConfig = PolicyConfig()
    engine: EngineConfig = EngineConfig()
    ray: RayConfig = RayConfig()
    nonfinite: NonFiniteConfig = NonFiniteConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resume: ResumeConfig = ResumeConfig()
    run: RunConfig = RunConfig()
    export: ExportConfig = ExportConfig()
    log: LogConfig = LogConfig()
    launch: LaunchConfig = LaunchConfig()
