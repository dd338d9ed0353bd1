"""The cache pass on Ray actors: each holds the teacher and writes its own shards."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from pocl_dist.config import Config
from pocl_dist.display.rows import RowProgress
from pocl_dist.errors import DataError, StorageError
from pocl_dist.failpoints import failpoint
from pocl_dist.pipeline.actor_pass import actors_of, work_off
from pocl_dist.pipeline.cache import CacheJob
from pocl_dist.pipeline.cache_inputs import check_truncation, truncation_errors
from pocl_dist.pipeline.quarantine import FILE, Quarantine
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.records import RowFailure
from pocl_dist.teacher.cache_files import CacheEntry, read_shards, remove_entry, tensor_file
from pocl_dist.teacher.cache_work import CacheShard
from pocl_dist.teacher.cache_worker import CacheResult, CacheWorker


def let_actors_answer(
    config: Config, run: RunDirectory, job: CacheJob, missing: Sequence[CacheShard]
) -> None:
    """Fills the cache with `missing`. Raises DataError (65) when rows could not be answered.

    Not before all others are: the plan asks for every row, and leaving one out would be another
    curriculum. Each attempt tries them again.
    """
    shards = {shard.name: shard for shard in missing}
    num_open = sum(shard.num_rows for shard in missing)
    progress = RowProgress("cache", len(job.examples), max(0, len(job.examples) - num_open))
    num_labels = sum(example.num_response_tokens for example in job.examples)
    entries = read_shards(run.teacher_cache)
    quarantine = Quarantine(run.teacher_cache / FILE, config.data.max_bad_rows)
    quarantine.path.unlink(missing_ok=True)

    def give_up(_: str, row: CacheShard, reason: str) -> None:
        quarantine.add([RowFailure(row.examples[0].example_id, "lost", reason)])

    with actors_of(config, run) as stop:
        work = work_off(
            config,
            stop,
            CacheWorker,
            job.settings,
            "cache",
            shards,
            progress,
            give_up,
            config.teacher.devices_per_actor,
        )
        # Closed before Ray is, also when a result is refused.
        with closing(work) as finished:
            for name, results in finished:
                failpoint("pass.before_save")
                written: list[CacheEntry] = []
                for result in results:
                    assert isinstance(result, CacheResult)
                    quarantine.add(result.failures)
                    written += _visible(run, result.entry)
                entries = _replaced(run, entries, shards[name], written)
                # What is still missing can only add to the sum: no need to wait for the verdict.
                check_truncation(config, run, truncation_errors(entries, num_labels))
                failpoint("pass.after_shard")
    _check_complete(quarantine)


def _visible(run: RunDirectory, entry: CacheEntry | None) -> list[CacheEntry]:
    """Returns the entry that an actor wrote; raises StorageError (74) if it is not to be seen."""
    if entry is None:
        return []
    path = tensor_file(run.teacher_cache, entry.name)
    if not path.exists():
        raise StorageError(
            f"{path}: an actor wrote it, but it is not here: run_dir must lie on storage that all "
            "nodes of Ray share"
        )
    return [entry]


def _replaced(
    run: RunDirectory, entries: list[CacheEntry], shard: CacheShard, written: list[CacheEntry]
) -> list[CacheEntry]:
    """Returns all entries, without those of an earlier attempt at the shard that lacked rows."""
    ids = {row.example_id for row in shard.examples}
    names = {entry.name for entry in written}
    kept = []
    for entry in entries:
        if entry.name in names:
            continue
        if written and all(row.example_id in ids for row in entry.rows):
            remove_entry(run.teacher_cache, entry.name)
        else:
            kept.append(entry)
    return kept + written


def _check_complete(quarantine: Quarantine) -> None:
    failures = list(quarantine.read().values())
    if failures:
        first = failures[0]
        raise DataError(
            f"{quarantine.path}: the teacher could not answer {len(failures)} rows of the plan, "
            f"the first ({first.example_id!r}): {first.reason}. All others are cached; the same "
            "command tries these again. Else remove the rows from data.train, lower "
            "data.max_tokens, or use teacher.source: online"
        )
