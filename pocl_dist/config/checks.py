"""What one field alone cannot tell: keys that contradict each other. Messages name the keys.

Each check yields a line per contradiction, so that all of them are told at once.
"""

from __future__ import annotations

from collections.abc import Iterator

from pocl_dist.config.curriculum_sections import Schedule, ScheduleConfig
from pocl_dist.config.loss_names import check_loss
from pocl_dist.config.schema import Config
from pocl_dist.errors import ConfigError

TEMPLATES = ("alpaca", "short", "chat")


def _schedule_values(schedule: Schedule) -> list[float]:
    if isinstance(schedule, ScheduleConfig):
        return [schedule.start] if schedule.end is None else [schedule.start, schedule.end]
    return schedule if isinstance(schedule, list) else [float(schedule)]


def _check_schedule(
    key: str, schedule: Schedule, num_stages: int, low: float, high: float
) -> Iterator[str]:
    if isinstance(schedule, list) and len(schedule) != num_stages:
        yield f"{key}: {schedule} has {len(schedule)} values for {num_stages} stages"
    if (
        isinstance(schedule, ScheduleConfig)
        and schedule.schedule != "constant"
        and schedule.end is None
    ):
        yield f"{key}.end: is required with schedule {schedule.schedule!r}"
    for value in _schedule_values(schedule):
        if not low <= value <= high:
            yield f"{key}: {value} is not allowed: must lie in [{low:g}, {high:g}]"


def _check_models(config: Config) -> Iterator[str]:
    student, teacher = config.models.student, config.models.teacher
    if student.path is None and student.init_layers is None:
        yield ("models.student.path: is required (or init_layers, to cut it from the teacher)")
    if student.path is not None and student.init_layers is not None:
        yield "models.student: path and init_layers exclude each other"
    if student.init_layers is not None:
        if teacher is None:
            yield "models.student.init_layers: needs models.teacher to cut from"
        if student.init_layers != sorted(set(student.init_layers)):
            yield (
                f"models.student.init_layers: {student.init_layers} must ascend, without repeats"
            )
        if student.adapter is not None:
            yield (
                "models.student.adapter: needs models.student.path; with init_layers the student "
                "is cut from the teacher, models.teacher.adapter merged"
            )


def _check_policy(config: Config) -> Iterator[str]:
    policy = config.policy
    if policy.mode == "off":
        return
    if config.models.teacher is None:
        yield f"policy.mode: {policy.mode!r} needs models.teacher, which is null"
    if config.teacher.source.startswith("cache_"):
        yield (
            f"policy.mode: {policy.mode!r} is not possible with teacher.source "
            f"{config.teacher.source!r}, which holds the references only; use 'online'"
        )
    if policy.mode == "adaptive" and config.data.dev is None:
        yield "policy.mode: 'adaptive' needs data.dev: it follows the dev loss"
    batch_size = config.engine.global_batch_size
    if policy.mode == "adaptive" and policy.replay_buffer_size < batch_size:
        yield (
            f"policy.replay_buffer_size: {policy.replay_buffer_size} answers cannot fill a batch "
            f"of engine.global_batch_size {batch_size} rows"
        )


def _check_teacher(config: Config) -> Iterator[str]:
    source = config.teacher.source
    if source == "online":
        return
    if config.models.teacher is None:
        yield f"teacher.source: {source!r} needs models.teacher"
    if config.teacher.cache_engine == "zero3" and config.teacher.devices_per_actor > 1:
        yield (
            "teacher.devices_per_actor: is for teacher.cache_engine: ray; under zero3 the teacher "
            "is partitioned over all ranks"
        )


def _check_engine(config: Config) -> Iterator[str]:
    engine = config.engine
    if engine.world_size is not None and engine.global_batch_size % engine.world_size:
        yield (
            f"engine.global_batch_size: {engine.global_batch_size} rows cannot be shared by "
            f"engine.world_size {engine.world_size} ranks; use a multiple of it"
        )
    if engine.zero_stage == 0 and engine.dtype in ("bf16", "fp16"):
        yield (f"engine.zero_stage: 0 trains in fp32 only, not {engine.dtype}; use stage 1, 2 or 3")
    if engine.offload_param != "none" and engine.zero_stage != 3:
        yield (f"engine.offload_param: needs engine.zero_stage 3, not {engine.zero_stage}")
    if engine.offload_optimizer != "none" and engine.zero_stage == 0:
        yield "engine.offload_optimizer: needs engine.zero_stage 1, 2 or 3"
    owned = {"stage", "offload_param", "offload_optimizer"} & set(engine.zero_options)
    if owned:
        yield f"engine.zero_options.{min(owned)}: is set by its own key under engine"
    if config.optimizer.min_learning_rate > config.optimizer.learning_rate:
        yield (
            f"optimizer.min_learning_rate: {config.optimizer.min_learning_rate} is above "
            f"optimizer.learning_rate {config.optimizer.learning_rate}"
        )


def _check_restarts(config: Config) -> Iterator[str]:
    steps, num_stages = config.optimizer.restart_steps, config.curriculum.num_stages
    if steps and num_stages > 1:
        yield (
            f"optimizer.restart_steps: {steps} needs curriculum.num_stages 1, not {num_stages}: "
            "with more, the cosine starts anew at every stage"
        )
    if steps != sorted(set(steps)):
        yield f"optimizer.restart_steps: {steps} must ascend, without repeats"


def _check_data(config: Config) -> Iterator[str]:
    data, curriculum = config.data, config.curriculum
    if data.max_prompt_tokens >= data.max_tokens:
        yield (
            f"data.max_prompt_tokens: {data.max_prompt_tokens} must be below data.max_tokens "
            f"{data.max_tokens}, or no response fits"
        )
    if data.template not in TEMPLATES and data.template.count("{prompt}") != 1:
        yield (
            f"data.template: {data.template!r} is not allowed: one of {', '.join(TEMPLATES)}, "
            "or text with {prompt} in it once"
        )
    if data.dev is None and curriculum.advance == "converged":
        yield "curriculum.advance: 'converged' needs data.dev"
    elif curriculum.advance == "converged" and config.dev.every is None:
        yield "curriculum.advance: 'converged' needs dev.every, the steps between dev evaluations"
    if data.dev is None and config.export.select == "best_dev":
        yield "export.select: 'best_dev' needs data.dev"


def _check_full_logits(config: Config) -> Iterator[str]:
    if config.loss.full_logits and config.teacher.source != "online":
        yield (
            f"loss.full_logits: needs teacher.source online, not {config.teacher.source}: "
            "hidden states, which a cache holds, are no logits without a linear head"
        )


def _check_no_secret(url: str) -> Iterator[str]:
    """A URL with a password: the config is kept in the run directory."""
    authority = url.partition("://")[2].partition("/")[0]
    if "@" in authority:  # the message must not repeat it either
        yield (
            "measure.server_url: no user or password may stand in it; put the key in an "
            "environment variable and name that in measure.server_key_variable"
        )


def _check_log(config: Config) -> Iterator[str]:
    if "@" in (config.log.mlflow_uri or ""):  # the message must not repeat it
        yield (
            "log.mlflow_uri: no user or password may stand in it; set $MLFLOW_TRACKING_USERNAME "
            "and $MLFLOW_TRACKING_PASSWORD, or $MLFLOW_TRACKING_TOKEN"
        )


def _check_passes(config: Config) -> Iterator[str]:
    measure = config.measure
    secrets = list(_check_no_secret(measure.server_url or ""))
    yield from secrets
    server_keys = ("server_url", "server_model", "server_key_variable")
    if measure.engine == "server":
        for key in server_keys[:2]:
            if getattr(measure, key) is None:
                yield f"measure.{key}: is required with measure.engine 'server'"
        url = measure.server_url
        if url is not None and not secrets and not url.startswith(("http://", "https://")):
            yield (
                f"measure.server_url: {measure.server_url!r} must begin with http:// or https://"
            )
        if measure.server_prompt == "messages" and config.data.template != "chat":
            yield (
                "measure.server_prompt: 'messages' needs data.template 'chat': "
                "the server renders them with the tokenizer's chat template"
            )
    else:
        for key in server_keys:
            if getattr(measure, key) is not None:
                yield f"measure.{key}: needs measure.engine 'server'"
    if config.data.responses == "teacher" and config.models.teacher is None:
        yield "data.responses: 'teacher' needs models.teacher"
    if config.generate.output is not None and not config.generate.output.endswith(".jsonl"):
        yield f"generate.output: {config.generate.output!r} must end in .jsonl"


def _check_loss(config: Config) -> Iterator[str]:
    try:
        check_loss(config.loss.name, config.loss.kwargs)
    except ValueError as error:
        yield str(error)


def _check_schedules(config: Config) -> Iterator[str]:
    curriculum = config.curriculum
    for key, schedule, low, high in (
        ("curriculum.temperature", curriculum.temperature, 1e-3, 1e3),
        ("curriculum.kd_ratio", curriculum.kd_ratio, 0.0, 1.0),
    ):
        yield from _check_schedule(key, schedule, curriculum.num_stages, low, high)


_CHECKS = (
    _check_models,
    _check_policy,
    _check_teacher,
    _check_data,
    _check_engine,
    _check_restarts,
    _check_full_logits,
    _check_passes,
    _check_schedules,
    _check_loss,
    _check_log,
)


def check_config(config: Config) -> None:
    """Raises ConfigError (64) for keys that contradict each other, a line per contradiction."""
    problems = [problem for check in _CHECKS for problem in check(config)]
    if problems:
        raise ConfigError("\n".join(problems))
