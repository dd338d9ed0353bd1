"""The cache pass on ranks: the teacher partitioned by ZeRO-3, each rank writes its own shards."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext

from pocl_dist.config import Config
from pocl_dist.data.encoding import collate
from pocl_dist.display.rows import RowProgress
from pocl_dist.distributed.checkpoint import agree_on_digest
from pocl_dist.distributed.collectives import barrier, gather_ints
from pocl_dist.distributed.process_group import Rank, join_process_group, lost_peers_named
from pocl_dist.errors import StoppedError
from pocl_dist.files import digest_of
from pocl_dist.pipeline.agreement import agree_on_setup
from pocl_dist.pipeline.cache import (
    CacheJob,
    missing_shards,
    prepare,
    remove_damage,
    start,
    summarise,
)
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.pipeline.stop_request import StopRequest
from pocl_dist.records import LMHead
from pocl_dist.teacher.cache_files import HEAD
from pocl_dist.teacher.cache_work import CacheShard
from pocl_dist.teacher.cache_writer import ShardWriter, write_head
from pocl_dist.teacher.online import OnlineTeacher


def cache_rank(config: Config, run: RunDirectory) -> None:
    """Fills the cache as `pipeline.cache.cache` does. Collective: the launcher starts every rank.

    1. rank 0 removes what is damaged, checks the disk and writes the inputs; 2. all ranks list the
    same missing shards; 3. they answer in lockstep, one shard per rank and round, until none is
    left or a stop is asked for (75); 4. the sum.
    """
    stop = StopRequest(run, config.run.max_wallclock_minutes)
    stop.install()
    rank = join_process_group(config.engine.timeout_seconds)
    started = time.monotonic()
    with lost_peers_named(rank):
        agree_on_setup(config, rank)
        job = prepare(config, run, is_read=True)
        agree_on_digest(digest_of(job.inputs), rank, "config, data, model or plan")
        if rank.is_main:
            remove_damage(run)
            if found := missing_shards(config, run, job):
                start(run, job, found)
        barrier(rank)
        missing = missing_shards(config, run, job)
        agree_on_digest(digest_of([shard.name for shard in missing]), rank, "the cache's files")
        if missing:
            _answer(config, stop, rank, job, missing)
        barrier(rank)
        summarise(config, run, time.monotonic() - started, rank.is_main)


def _answer(
    config: Config, stop: StopRequest, rank: Rank, job: CacheJob, missing: Sequence[CacheShard]
) -> None:
    """Works off the shards, one per rank and round. Collective."""
    teacher = OnlineTeacher(job.teacher, config, rank, job.settings.num_real_tokens)
    num_open = sum(shard.num_rows for shard in missing)
    progress = RowProgress("cache", len(job.examples), max(0, len(job.examples) - num_open))
    with progress if rank.is_main else nullcontext():
        for first in range(0, len(missing), rank.world_size):
            is_asked = [row[0] for row in gather_ints([int(stop.is_asked())], rank)]
            if any(is_asked):
                raise StoppedError(
                    "stopped on request; what is finished is saved, the same command goes on"
                )
            shards = missing[first : first + rank.world_size]
            _answer_round(teacher, rank, job, shards)
            if rank.is_main:
                num_tokens = sum(shard.num_tokens("cache") for shard in shards)
                progress.advance(sum(shard.num_rows for shard in shards), num_tokens)


def _answer_round(
    teacher: OnlineTeacher, rank: Rank, job: CacheJob, shards: Sequence[CacheShard]
) -> None:
    """Answers this rank's shard of a round and writes it. Collective: the gathers of ZeRO-3.

    Every rank asks as often as the one with most batches, with a masked dummy if need be.
    """
    content = job.settings.content
    shard = shards[rank.index] if rank.index < len(shards) else None
    writer = None if shard is None else ShardWriter(content, shard)
    batches = () if shard is None else shard.batches
    for index in range(max(len(shard.batches) for shard in shards)):
        rows = batches[index].asked if index < len(batches) else ()
        with teacher.answer(collate(rows, job.settings.pad_id).to(rank.device)) as output:
            if rank.is_main and content.top_k is None:
                assert output.head is not None
                _write_missing_head(job, output.head)
            if writer is not None and rows:
                writer.add(output)
    if writer is not None:
        writer.write()


def _write_missing_head(job: CacheJob, head: LMHead) -> None:
    folder = job.settings.content.folder
    if not (folder / f"{HEAD}.json").exists():
        write_head(folder, head)
