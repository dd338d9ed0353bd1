"""What one field alone cannot tell: keys that contradict each other. Messages name the keys."""

from __future__ import annotations

from pocl_dist.config.curriculum_sections import Schedule, ScheduleConfig
from pocl_dist.config.loss_names import check_loss
from pocl_dist.config.schema import Config
from pocl_dist.errors import ConfigError

TEMPLATES = ("alpaca", "short", "chat")


def _schedule_values(schedule: Schedule) -> list[float]:
    if isinstance(schedule, ScheduleConfig):
        return [schedule.start] if schedule.end is None else [schedule.start, schedule.end]
    return schedule if isinstance(schedule, list) else [float(schedule)]


def _check_schedule(key: str, schedule: Schedule, num_stages: int, low: float, high: float) -> None:
    if isinstance(schedule, list) and len(schedule) != num_stages:
        raise ConfigError(f"{key}: {schedule} has {len(schedule)} values for {num_stages} stages")
    if (
        isinstance(schedule, ScheduleConfig)
        and schedule.schedule != "constant"
        and schedule.end is None
    ):
        raise ConfigError(f"{key}.end: is required with schedule {schedule.schedule!r}")
    for value in _schedule_values(schedule):
        if not low <= value <= high:
            raise ConfigError(f"{key}: {value} is not allowed: must lie in [{low:g}, {high:g}]")


def _check_models(config: Config) -> None:
    student, teacher = config.models.student, config.models.teacher
    if student.path is None and student.init_layers is None:
        raise ConfigError(
            "models.student.path: is required (or init_layers, to cut it from the teacher)"
        )
    if student.path is not None and student.init_layers is not None:
        raise ConfigError("models.student: path and init_layers exclude each other")
    if student.init_layers is not None:
        if teacher is None:
            raise ConfigError("models.student.init_layers: needs models.teacher to cut from")
        if student.init_layers != sorted(set(student.init_layers)):
            raise ConfigError(
                f"models.student.init_layers: {student.init_layers} must ascend, without repeats"
            )


def _check_policy(config: Config) -> None:
    policy = config.policy
    if policy.mode == "off":
        return
    if config.models.teacher is None:
        raise ConfigError(f"policy.mode: {policy.mode!r} needs models.teacher, which is null")
    if config.teacher.source.startswith("cache_"):
        raise ConfigError(
            f"policy.mode: {policy.mode!r} is not possible with teacher.source "
            f"{config.teacher.source!r}, which holds the references only; use 'online'"
        )
    if policy.mode == "adaptive" and config.data.dev is None:
        raise ConfigError("policy.mode: 'adaptive' needs data.dev: it follows the dev loss")
    batch_size = config.engine.global_batch_size
    if policy.mode == "adaptive" and policy.replay_buffer_size < batch_size:
        raise ConfigError(
            f"policy.replay_buffer_size: {policy.replay_buffer_size} answers cannot fill a batch "
            f"of engine.global_batch_size {batch_size} rows"
        )


def _check_engine(config: Config) -> None:
    engine = config.engine
    if engine.world_size is not None and engine.global_batch_size % engine.world_size:
        raise ConfigError(
            f"engine.global_batch_size: {engine.global_batch_size} rows cannot be shared by "
            f"engine.world_size {engine.world_size} ranks; use a multiple of it"
        )
    if engine.zero_stage == 0 and engine.dtype in ("bf16", "fp16"):
        raise ConfigError(
            f"engine.zero_stage: 0 trains in fp32 only, not {engine.dtype}; use stage 1, 2 or 3"
        )
    if engine.offload_param != "none" and engine.zero_stage != 3:
        raise ConfigError(
            f"engine.offload_param: needs engine.zero_stage 3, not {engine.zero_stage}"
        )
    if engine.offload_optimizer != "none" and engine.zero_stage == 0:
        raise ConfigError("engine.offload_optimizer: needs engine.zero_stage 1, 2 or 3")
    owned = {"stage", "offload_param", "offload_optimizer"} & set(engine.zero_options)
    if owned:
        raise ConfigError(f"engine.zero_options.{min(owned)}: is set by its own key under engine")
    if config.optimizer.min_learning_rate > config.optimizer.learning_rate:
        raise ConfigError(
            f"optimizer.min_learning_rate: {config.optimizer.min_learning_rate} is above "
            f"optimizer.learning_rate {config.optimizer.learning_rate}"
        )


def _check_data(config: Config) -> None:
    data, curriculum = config.data, config.curriculum
    if data.max_prompt_tokens >= data.max_tokens:
        raise ConfigError(
            f"data.max_prompt_tokens: {data.max_prompt_tokens} must be below data.max_tokens "
            f"{data.max_tokens}, or no response fits"
        )
    if data.template not in TEMPLATES and data.template.count("{prompt}") != 1:
        raise ConfigError(
            f"data.template: {data.template!r} is not allowed: one of {', '.join(TEMPLATES)}, "
            "or text with {prompt} in it once"
        )
    if data.dev is None and curriculum.advance == "converged":
        raise ConfigError("curriculum.advance: 'converged' needs data.dev")
    if curriculum.advance == "converged" and config.dev.every is None:
        raise ConfigError(
            "curriculum.advance: 'converged' needs dev.every, the steps between dev evaluations"
        )
    if data.dev is None and config.export.select == "best_dev":
        raise ConfigError("export.select: 'best_dev' needs data.dev")


def check_config(config: Config) -> None:
    """Raises ConfigError (64) for keys that contradict each other."""
    curriculum = config.curriculum
    _check_models(config)
    _check_policy(config)
    _check_data(config)
    _check_engine(config)
    _check_schedule(
        "curriculum.temperature", curriculum.temperature, curriculum.num_stages, 1e-3, 1e3
    )
    _check_schedule("curriculum.kd_ratio", curriculum.kd_ratio, curriculum.num_stages, 0.0, 1.0)
    try:
        check_loss(config.loss.name, config.loss.kwargs)
    except ValueError as error:
        raise ConfigError(str(error)) from error
