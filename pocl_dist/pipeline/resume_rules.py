"""What a changed config key does when a run is continued; `docs/resume.md` shows it as a table.

A key that stands in the record of a result refuses (78) to go on from that result with another
value. All others are listed here, each with the reason why it is free: a new key that is in no
record and not here fails a test. No key makes a step start over in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import get_args

from pydantic import BaseModel

from pocl_dist.config import Config, ScheduleConfig, select_keys
from pocl_dist.pipeline import cache_inputs, difficulty_files, evaluate, generated_files, plan
from pocl_dist.pipeline.inputs import result_inputs
from pocl_dist.records import Plan

_COMPUTED = "the same result, computed otherwise (to rounding)"
_SPEED = "speed and waiting only"
_ROWS = "what counts is which rows come out: their digest is compared"
_FAULTS = "the next step that is not finite is treated by the new rule"
_SHOWN = "what is shown and kept besides the result"
_TRACKED = "a tracker that has the run goes on with it, others begin one"

FREE: Mapping[str, str] = MappingProxyType(
    {
        "run_dir": "another folder is another run",
        "data.eval": "a new set is answered too; changed rows under an old name are refused",
        "data.on_bad_row": _ROWS,
        "data.max_bad_rows": _ROWS,
        "dev.quarter_rows": "what is shown besides the result; later lines are of other rows",
        "loss.chunk_tokens": _COMPUTED,
        "loss.full_logits": _COMPUTED,
        "loss.compile": _COMPUTED,
        "measure.server_key_variable": "a secret; it is recorded nowhere",
        "measure.server_concurrency": _SPEED,
        "measure.server_timeout_seconds": _SPEED,
        "measure.server_retries": _SPEED,
        "generate.output": "the same answers are written there",
        "report.answers": _SHOWN,
        "evaluate.baselines": "more models are answered, or fewer reported",
        "teacher.max_truncation_error": "the cache is judged again by the new bound (64)",
        "teacher.cache_engine": _COMPUTED,
        "teacher.cache_batch_size": _COMPUTED,
        "teacher.devices_per_actor": _COMPUTED,
        "teacher.offload_param": _COMPUTED,
        "engine.zero_stage": _COMPUTED,
        "engine.world_size": "checkpoints are read by any number of ranks (to rounding)",
        "engine.micro_batch_size": _COMPUTED,
        "engine.max_waste": _COMPUTED,
        "engine.packing": _COMPUTED,
        "engine.gradient_checkpointing": _COMPUTED,
        "engine.offload_optimizer": _COMPUTED,
        "engine.offload_param": _COMPUTED,
        "engine.zero_options": _COMPUTED,
        "engine.timeout_seconds": _SPEED,
        "ray.address": _COMPUTED,
        "ray.num_actors": _SPEED,
        "ray.shard_size": "shards that are there are kept; new ones have the new size",
        "ray.start_timeout_seconds": _SPEED,
        "checkpoint.every": _SHOWN,
        "checkpoint.every_minutes": _SHOWN,
        "checkpoint.keep_last": _SHOWN,
        "checkpoint.keep_stage_ends": _SHOWN,
        "checkpoint.asynchronous": _SPEED,
        "checkpoint.mtbf_hours": _SHOWN,
        "nonfinite.max_in_row": _FAULTS,
        "nonfinite.max_dumps": _SHOWN,
        "nonfinite.rewind": _FAULTS,
        "nonfinite.max_rewinds": _FAULTS,
        "resume.on_damage": "a rule for this attempt",
        "resume.strict_versions": "a rule for this attempt",
        "run.max_wallclock_minutes": "a rule for this attempt",
        "run.scratch_dir": _SPEED,
        "run.max_restarts": "a rule for this attempt",
        "evaluate.harness": "other tasks are done too; changed ones are refused",
        "log.output": _SHOWN,
        "log.every": _SHOWN,
        "log.trackers": _SHOWN,
        "log.project": _TRACKED,
        "log.run_name": _TRACKED,
        "log.wandb_mode": _SHOWN,
        "log.mlflow_uri": _TRACKED,
        "log.trackio_space": _TRACKED,
        "launch": "where it is computed, and who starts it (to rounding)",
    }
)


# Sections of which all keys are free, for one reason: one row of the table.
_FREE_SECTIONS = ("launch",)
# The record of a run without top-k cache has `teacher.top_k: null`, whatever the config says.
_RECORDED_AS = {"teacher.source": ("teacher.top_k",)}


@dataclass(frozen=True)
class Rule:
    """One row of the table: the results that refuse another value, or why it is free."""

    key: str
    refused_by: tuple[str, ...]
    reason: str

    def effect(self) -> str:
        """Returns the cell of the table."""
        if self.refused_by:
            return f"refused (78) by what is in {', '.join(self.refused_by)}"
        return f"goes on: {self.reason}"


def records_of(config: Config, made: Plan) -> dict[str, dict[str, object]]:
    """Returns {result: the keys of the config that its record holds}, as the steps compare them."""
    return {
        "`generated/`": dict(generated_files.config_inputs(config)),
        "`difficulty/`": dict(difficulty_files.config_keys(config)),
        "`plan.json`": dict(plan.config_keys(config)),
        "`teacher_cache/`": dict(cache_inputs.config_keys(config, made)),
        "`checkpoints/`, `export/`": dict(result_inputs(config)),
        "`eval/`": dict(evaluate.config_keys(config)),
    }


def _sections(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections(argument)]


def schema_keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Yields every dotted key of the config, those of optional sections too; schedules are one."""
    for name, field in section.model_fields.items():
        sections = [kind for kind in _sections(field.annotation) if kind is not ScheduleConfig]
        if sections and f"{prefix}{name}" not in _FREE_SECTIONS:
            yield from schema_keys(sections[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def full_config() -> Config:
    """Returns a config with all optional sections, a curriculum and a top-k cache: no key hides."""
    student = {"path": "student", "lora": {}}
    return Config.model_validate(
        {
            "run_dir": "run",
            "models": {"teacher": {"path": "teacher"}, "student": student},
            "data": {"train": "train.jsonl"},
            "teacher": {"source": "cache_topk"},
        }
    )


def rules() -> list[Rule]:
    """Returns the rule of every key of the schema, in its order."""
    config = full_config()
    records = records_of(config, Plan((), ()))
    found = []
    for key in schema_keys():
        leaves = set(select_keys(config, [key, *_RECORDED_AS.get(key, ())]))
        refused_by = tuple(name for name, record in records.items() if leaves & set(record))
        found.append(Rule(key, refused_by, FREE.get(key, "")))
    return found


def table() -> str:
    """Returns the table of `docs/resume.md`, in Markdown."""
    lines = [f"| `{rule.key}` | {rule.effect()} |" for rule in rules()]
    return "\n".join(["| key | another value when the run goes on |", "|---|---|", *lines]) + "\n"


if __name__ == "__main__":
    print(table(), end="")
