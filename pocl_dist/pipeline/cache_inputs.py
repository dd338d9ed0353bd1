"""What a teacher cache is made from and for: rows as the plan has them, keys, digests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from pocl_dist.config import Config, select_keys
from pocl_dist.data.sources import Rows
from pocl_dist.distributed.scratch import scratch_folder
from pocl_dist.errors import ConfigError, MissingInputError
from pocl_dist.files import JSONValue, read_json
from pocl_dist.list_digest import ListDigest
from pocl_dist.models.sources import ModelFolder
from pocl_dist.pipeline.difficulty_files import model_inputs
from pocl_dist.pipeline.run_directory import RunDirectory, check_made_from
from pocl_dist.records import EncodedExample, Plan
from pocl_dist.teacher.cache_files import CacheEntry
from pocl_dist.teacher.cache_work import content_hash

if TYPE_CHECKING:
    from pocl_dist.distributed.process_group import Rank
    from pocl_dist.teacher.cache import CachedTeacher

_INPUT_KEYS = (
    "teacher.source",
    "data.template",
    "data.max_tokens",
    "data.max_prompt_tokens",
    "engine.dtype",
)


def plan_temperatures(plan: Plan) -> tuple[float, ...]:
    """Returns the temperatures at which the teacher is needed, ascending, each once."""
    return tuple(sorted({stage.temperature for stage in plan.stages if stage.kd_ratio > 0}))


def config_keys(config: Config, plan: Plan) -> dict[str, JSONValue]:
    """Returns the config keys, and what of the plan, the cached values depend on."""
    keys = select_keys(config, _INPUT_KEYS)
    if config.teacher.source == "cache_topk":
        keys["teacher.top_k"] = config.teacher.top_k
        keys["plan temperatures"] = list(plan_temperatures(plan))
    return keys


def cache_inputs(
    config: Config,
    rows: Rows,
    plan: Plan,
    teacher: ModelFolder,
    examples: Sequence[EncodedExample],
) -> dict[str, JSONValue]:
    """Returns the config keys and digests that the cached values depend on."""
    # By id: plans that rank the same rows otherwise can share a cache.
    tokens = ListDigest()
    for example_id, digest in sorted((row.example_id, content_hash(row)) for row in examples):
        tokens.add([example_id, digest])
    return {
        **config_keys(config, plan),
        **model_inputs("models.teacher model", teacher),
        "data.train sha256": rows.digest,
        "data.train tokens sha256": tokens.hexdigest(),
    }


def truncation_errors(entries: Sequence[CacheEntry], num_labels: int) -> dict[str, float]:
    """Returns {temperature: summed error / `num_labels`}; empty for hidden states."""
    sums: dict[str, list[float]] = {}
    for entry in entries:
        for temperature, value in (entry.truncation_sums or {}).items():
            sums.setdefault(temperature, []).append(value)
    return {key: math.fsum(values) / num_labels for key, values in sorted(sums.items())}


def check_truncation(config: Config, run: RunDirectory, errors: Mapping[str, float]) -> None:
    """Raises ConfigError (64) when top-k is too far from the teacher at some temperature.

    `errors`: {temperature: mean total variation over the label tokens}.
    """
    bound = config.teacher.max_truncation_error
    worst = max(errors, key=lambda key: errors[key], default=None)
    if worst is not None and errors[worst] > bound:
        raise ConfigError(
            f"teacher.top_k: {config.teacher.top_k} tokens are too few: at temperature {worst} "
            f"the mean total variation to the teacher is {errors[worst]:.4f} or more, above "
            f"teacher.max_truncation_error {bound:g}. Raise top_k (and remove "
            f"{run.teacher_cache}), raise the bound, or use teacher.source: cache_hidden (exact)"
        )


def cached_teacher(
    config: Config,
    run: RunDirectory,
    rank: Rank,
    teacher: ModelFolder,
    rows: Rows,
    plan: Plan,
    examples: Sequence[EncodedExample],
) -> CachedTeacher:
    """Returns the teacher as its cache answers for it. Collective.

    `examples` are all that training will ask about, in the order of the plan's ranking.
    Raises MissingInputError (66) when there is no finished cache, MismatchError (78) when it was
    made from other inputs or is damaged, ConfigError (64) when top-k cuts off too much.
    """
    from pocl_dist.distributed.process_group import torch_dtype
    from pocl_dist.teacher.cache import CachedTeacher
    from pocl_dist.teacher.cache_copy import check_undamaged, copy_to_node

    record = run.teacher_cache / "inputs.json"
    is_made = check_made_from(record, cache_inputs(config, rows, plan, teacher, examples))
    if not is_made or not (run.teacher_cache / "summary.json").exists():
        raise MissingInputError(
            f"teacher.source: {config.teacher.source!r}: {run.teacher_cache} holds no finished "
            "cache: run `pocl-dist cache` first"
        )
    summary = read_json(run.teacher_cache / "summary.json")
    check_truncation(config, run, cast("dict[str, float]", summary["truncation_error"] or {}))
    folder = run.teacher_cache
    if config.run.scratch_dir is None:
        check_undamaged(folder, rank)
    else:
        folder = copy_to_node(folder, scratch_folder(config.run.scratch_dir), rank)
    return CachedTeacher(
        folder,
        examples,
        rank,
        torch_dtype(config.engine.dtype, rank.device),
        is_top_k=config.teacher.source == "cache_topk",
    )
