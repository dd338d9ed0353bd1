"""The config: frozen dataclass-like models in `schema`, loading and messages in `load`."""

from pocl_dist.config.keys import compare_inputs, flatten, select_keys
from pocl_dist.config.load import dump_config, load_config
from pocl_dist.config.schema import (
    CheckpointConfig,
    Config,
    CurriculumConfig,
    DataConfig,
    EngineConfig,
    EvaluateConfig,
    GenerationConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RayConfig,
    ScheduleConfig,
    StudentConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "CurriculumConfig",
    "DataConfig",
    "EngineConfig",
    "EvaluateConfig",
    "GenerationConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RayConfig",
    "ScheduleConfig",
    "StudentConfig",
    "compare_inputs",
    "dump_config",
    "flatten",
    "load_config",
    "select_keys",
]
