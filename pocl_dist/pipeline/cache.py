"""The optional step between plan and distill: the teacher answers every training row once.

The curriculum visits a row about 20 times; from the cache the teacher's backbone runs once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pocl_dist.config import Config
from pocl_dist.display.output import say, warn
from pocl_dist.errors import ConfigError, MissingInputError, StorageError
from pocl_dist.files import JSONValue, atomic_write_json, free_bytes
from pocl_dist.models.config_fit import check_top_k
from pocl_dist.models.sources import ModelFolder
from pocl_dist.pipeline.cache_inputs import (
    cache_inputs,
    check_truncation,
    plan_temperatures,
    truncation_errors,
)
from pocl_dist.pipeline.inputs import make_encoder, read_train, student_source, teacher_source
from pocl_dist.pipeline.launch_local import is_distilled, launch_ranks
from pocl_dist.pipeline.plan_files import ranked_rows, read_plan
from pocl_dist.pipeline.run_directory import RunDirectory, check_made_from
from pocl_dist.records import EncodedExample
from pocl_dist.teacher.cache_files import (
    HEAD,
    entry_names,
    find_damage,
    is_cached,
    read_entry,
    read_index,
    read_shards,
    remove_entry,
    remove_torn_files,
)
from pocl_dist.teacher.cache_work import CacheShard, make_cache_shards

if TYPE_CHECKING:
    from pocl_dist.teacher.cache_worker import CacheSettings


@dataclass(frozen=True)
class CacheJob:
    """All that a cache pass needs to know, the same on every rank."""

    teacher: ModelFolder
    examples: tuple[EncodedExample, ...]
    inputs: dict[str, JSONValue]
    settings: CacheSettings
    label_bytes: int  # what a label position takes
    head_bytes: int  # 0: no head is stored


def cache(config: Config, run: RunDirectory) -> None:
    """Writes `teacher_cache/`: shards of what the teacher says of each row, then the summary.

    1. refuse a cache that was made from other inputs; 2. hash what is there and remove what is
    damaged; 3. compare the size of what is missing with the free disk; 4. let actors (or ranks)
    answer the missing rows, each shard saved by who computed it; 5. check the truncation error,
    summarise. An interrupted pass goes on with what is missing. Raises DataError (65) when rows
    could not be answered: the plan asks for all of them.
    """
    if is_distilled(config, run):
        say(f"cache: not needed, {run.export} is there")
        return
    if not any(stage.kd_ratio > 0 for stage in read_plan(run.plan).stages):
        say("cache: not needed, no stage asks the teacher (curriculum.kd_ratio is 0)")
        return
    started = time.monotonic()
    job = prepare(config, run)
    remove_damage(run)
    missing = missing_shards(config, run, job)
    if missing:
        start(run, job, missing)
        if config.teacher.cache_engine == "zero3":
            launch_ranks(config, run, "cache")
            return  # the ranks have summarised
        from pocl_dist.pipeline.cache_actors import let_actors_answer

        let_actors_answer(config, run, job, missing)
    else:
        say(f"cache: {len(job.examples)} rows are cached already")
    summarise(config, run, time.monotonic() - started)


def prepare(config: Config, run: RunDirectory, is_read: bool = False) -> CacheJob:
    """Returns what is to be done; `is_read` as for `read_train`.

    Raises ConfigError (64) for a source without cache and a `top_k` above the vocabulary,
    MissingInputError (66) without a plan, MismatchError (78) for a cache of other inputs.
    """
    source = config.teacher.source
    if source == "online":
        raise ConfigError(
            "teacher.source: 'online' has nothing to cache; set cache_hidden or cache_topk"
        )
    plan, rows = read_plan(run.plan), read_train(config, is_read)
    teacher, student = teacher_source(config, run), student_source(config, run)
    assert teacher is not None, "checked with the config"
    if not (student.folder / "config.json").exists():
        raise MissingInputError(
            f"models.student: {student.folder} is not there yet: run `pocl-dist init-student` first"
        )
    from pocl_dist.data.encoding import pad_id_of
    from pocl_dist.models.loading import load_tokenizer
    from pocl_dist.models.tokenizer_checks import check_same_tokenizer
    from pocl_dist.teacher.cache_worker import CacheSettings
    from pocl_dist.teacher.cache_writer import CacheContent

    tokenizer = load_tokenizer(student)
    check_same_tokenizer(load_tokenizer(teacher), tokenizer)
    top_k = config.teacher.top_k if source == "cache_topk" else None
    check_top_k(config, len(tokenizer))
    encoder = make_encoder(config, tokenizer)
    places = ranked_rows(plan, rows)
    examples = tuple(encoder.encode(rows.examples[place]) for place in places.tolist())
    inputs = cache_inputs(config, rows, plan, teacher, examples)
    check_made_from(run.teacher_cache / "inputs.json", inputs)
    settings = CacheSettings(
        model=teacher,
        model_digest=str(inputs["models.teacher model sha256"]),
        content=CacheContent(run.teacher_cache.resolve(), top_k, plan_temperatures(plan)),
        num_real_tokens=len(tokenizer),
        pad_id=pad_id_of(tokenizer),
        num_threads=config.ray.cpus_per_actor,
        dtype_name=config.engine.dtype,
        num_devices=config.teacher.devices_per_actor,
    )
    label_bytes, head_bytes = _sizes(config, teacher, top_k)
    return CacheJob(teacher, examples, inputs, settings, label_bytes, head_bytes)


def _sizes(config: Config, teacher: ModelFolder, top_k: int | None) -> tuple[int, int]:
    """Returns the bytes of a label position and of the head, from the teacher's config alone."""
    import torch

    from pocl_dist.distributed.process_group import torch_dtype
    from pocl_dist.models.loading import hidden_size, vocabulary_rows

    if top_k is not None:
        return 8 * top_k + 4, 0  # int32 ids and fp32 log-probabilities, and the tail's
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    row_bytes = hidden_size(teacher) * torch_dtype(config.engine.dtype, device).itemsize
    return row_bytes, vocabulary_rows(teacher) * row_bytes


def remove_damage(run: RunDirectory) -> None:
    """Removes what is not as it was written: it is computed again. Reads the whole cache."""
    folder = run.teacher_cache
    remove_torn_files(folder)
    for damage in find_damage(folder, entry_names(folder)):
        warn(f"{damage.reason}; it is computed again")
        remove_entry(folder, damage.name)


def missing_shards(config: Config, run: RunDirectory, job: CacheJob) -> list[CacheShard]:
    """Returns the shards with a row that is not cached, whole: a part would be padded otherwise."""
    teacher = config.teacher
    shards = make_cache_shards(job.examples, teacher.cache_batch_size, config.ray.shard_size)
    index = read_index(read_shards(run.teacher_cache))
    missing = [
        shard for shard in shards if not all(is_cached(index, row) for row in shard.examples)
    ]
    if not missing and job.head_bytes and HEAD not in entry_names(run.teacher_cache):
        return [shards[-1]]  # the head comes with any shard; this one is the cheapest
    return missing


def start(run: RunDirectory, job: CacheJob, missing: Sequence[CacheShard]) -> None:
    """Writes down what the cache is made from; raises StorageError (74) if it will not fit."""
    num_labels = sum(shard.num_labels for shard in missing)
    has_head = HEAD in entry_names(run.teacher_cache)
    needed = num_labels * job.label_bytes + (0 if has_head else job.head_bytes)
    free = free_bytes(run.teacher_cache)
    sizes = f"{num_labels} label tokens x {job.label_bytes} bytes" + (
        f" + {job.head_bytes} bytes for the head" if job.head_bytes and not has_head else ""
    )
    if needed > free:
        raise StorageError(
            f"{run.teacher_cache}: the cache needs about {needed} bytes ({sizes}), "
            f"{free} bytes are free; nothing was written. Free some disk, or choose "
            "teacher.source: cache_topk with a smaller teacher.top_k, or online"
        )
    say(
        f"cache: {sum(shard.num_rows for shard in missing)} of {len(job.examples)} rows, in "
        f"{len(missing)} shards, with {job.teacher.origin}: about {needed / 1e6:.1f} MB ({sizes})"
    )
    (run.teacher_cache / "summary.json").unlink(missing_ok=True)  # it says that all is there
    record = run.teacher_cache / "inputs.json"
    if not record.exists():
        atomic_write_json(record, job.inputs)


def summarise(config: Config, run: RunDirectory, seconds: float, is_main: bool = True) -> None:
    """Writes `summary.json` and prints it; raises ConfigError (64) as `_check_truncation` does.

    Ranks other than the main one only raise.
    """
    folder = run.teacher_cache
    entries = read_shards(folder)
    num_labels = sum(entry.num_labels for entry in entries)
    errors = truncation_errors(entries, num_labels)
    check_truncation(config, run, errors)
    if not is_main:
        return
    is_top_k = config.teacher.source == "cache_topk"
    num_bytes = sum(read_entry(folder, name).num_bytes for name in entry_names(folder))
    summary = {
        "source": config.teacher.source,
        "top_k": config.teacher.top_k if is_top_k else None,
        "num_examples": sum(len(entry.rows) for entry in entries),
        "num_label_tokens": num_labels,
        "num_shards": len(entries),
        "bytes": num_bytes,
        "num_halved_batches": sum(entry.num_halved for entry in entries),
        # Mean total variation to the teacher, over all label tokens.
        "truncation_error": errors if is_top_k else None,
    }
    if not (folder / "summary.json").exists():
        atomic_write_json(folder / "summary.json", {**summary, "seconds": seconds})
    say(
        f"cache: {summary['num_examples']} rows, {num_labels} label tokens, "
        f"{num_bytes / 1e6:.1f} MB in {seconds:.0f} s"
    )
    for temperature, error in errors.items():
        say(f"cache: truncation error at temperature {temperature}: {error:.4f} (total variation)")
