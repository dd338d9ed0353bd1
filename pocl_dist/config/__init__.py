"""The config: frozen dataclass-like models in `schema`, loading and messages in `load`."""

from pocl_dist.config.curriculum_sections import CurriculumConfig, ScheduleConfig
from pocl_dist.config.input_sections import DataConfig, LoRAConfig, ModelConfig, StudentConfig
from pocl_dist.config.keys import compare_inputs, flatten, select_keys
from pocl_dist.config.launch_sections import LaunchConfig
from pocl_dist.config.load import dump_config, load_config, load_words, replaced
from pocl_dist.config.pass_sections import (
    EvaluateConfig,
    GenerateConfig,
    GenerationConfig,
    MeasureConfig,
    RayConfig,
)
from pocl_dist.config.schema import Config
from pocl_dist.config.training_sections import (
    CheckpointConfig,
    EngineConfig,
    LossConfig,
    OptimizerConfig,
    PolicyConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "CurriculumConfig",
    "DataConfig",
    "EngineConfig",
    "EvaluateConfig",
    "GenerateConfig",
    "GenerationConfig",
    "LaunchConfig",
    "LoRAConfig",
    "LossConfig",
    "MeasureConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PolicyConfig",
    "RayConfig",
    "ScheduleConfig",
    "StudentConfig",
    "compare_inputs",
    "dump_config",
    "flatten",
    "load_config",
    "load_words",
    "replaced",
    "select_keys",
]
