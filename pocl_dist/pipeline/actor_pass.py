"""One pass of actors over shards: with progress, rows that fail set aside, and a clean end.

A signal, the stop file or the time limit ends it; what is saved is not done again.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar, cast

from pocl_dist.config import Config, EvaluateConfig
from pocl_dist.config.pass_sections import GenerateConfig
from pocl_dist.difficulty.work import CountedT, WorkShard, sizes_of, tokens_of
from pocl_dist.difficulty.worker import ModelWorker, ShardResult, WorkerSettings
from pocl_dist.display.output import say
from pocl_dist.display.rows import RowProgress
from pocl_dist.distributed.ray_pool import ActorPool
from pocl_dist.distributed.ray_session import ray_session
from pocl_dist.errors import PoclError, StoppedError, WorkerError
from pocl_dist.failpoints import failpoint
from pocl_dist.models.generation import Sampling
from pocl_dist.models.sources import ModelFolder
from pocl_dist.pipeline.quarantine import Quarantine
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.pipeline.status_file import read_status
from pocl_dist.pipeline.stop_request import StopRequest
from pocl_dist.records import RowFailure


def _take_signals(stop: StopRequest) -> None:
    """Makes signals set the flag; only the main thread may."""
    if threading.current_thread() is threading.main_thread():
        stop.install()


@contextlib.contextmanager
def stop_request(run: RunDirectory, max_wallclock_minutes: float | None) -> Iterator[StopRequest]:
    """Turns signals and a time limit into a flag while the context lasts.

    After it signals do what they did before.
    """
    with StopRequest(run, max_wallclock_minutes).installed() as stop:
        yield stop


def worker_settings(
    config: Config,
    model: ModelFolder,
    model_digest: str,
    sampled: EvaluateConfig | GenerateConfig | None = None,
) -> WorkerSettings:
    """Returns what actors answer with: greedy, or drawn as the section `sampled` says."""
    sampling = Sampling(config.generation.max_new_tokens)
    if sampled is not None:
        sampling = replace(
            sampling,
            do_sample=sampled.do_sample,
            temperature=sampled.temperature,
            top_p=sampled.top_p,
            no_repeat_ngram_size=sampled.no_repeat_ngram_size,
        )
    return WorkerSettings(
        model, model_digest, sampling, config.ray.cpus_per_actor, config.engine.dtype
    )


T = TypeVar("T")
# Whoever ends a job signals all its processes: Ray's daemons may be gone before we are told.
LAST_SIGNAL_SECONDS = 1.0


@dataclass(frozen=True)
class RowPass(Generic[T]):
    """What the actors of a ModelWorker are to do, and what becomes of it."""

    title: str
    method: str  # of the worker
    settings: WorkerSettings
    shards: Mapping[str, WorkShard]
    num_rows: int  # of the whole pass, those that are done among them
    save: Callable[[str, ShardResult[T]], None]  # a shard's name and all that came of it
    quarantine: Callable[[str], Quarantine]  # where the rows of that shard are listed


@contextlib.contextmanager
def actors_of(config: Config, run: RunDirectory) -> Iterator[StopRequest]:
    """Holds a Ray session, and looks for requests to stop, while the context lasts."""
    with stop_request(run, config.run.max_wallclock_minutes) as stop:

        def end(reason: str) -> None:
            time.sleep(LAST_SIGNAL_SECONDS)
            state, code = ("stopped", 75) if stop.is_asked() else ("failed", WorkerError.exit_code)
            reason += "; what is finished is saved, the same command goes on"
            with contextlib.suppress(OSError, PoclError):  # a full disk, or another has the run
                run.write_status(state, code, str(read_status(run.status)["phase"]), reason)
            print(reason, file=sys.stderr, flush=True)
            os._exit(code)  # nothing of Ray works any more, its shutdown neither

        with ray_session(config.ray, end):
            yield stop


def answer_rows(config: Config, stop: StopRequest, work: RowPass[T]) -> None:
    """Lets actors work off the shards of a pass; saves each, whole, as soon as it is done.

    Rows that fail are listed before that: a saved shard is one that is not done again.
    """
    num_open = sum(sizes_of(work.shards).values())
    say(
        f"{work.title}: {num_open} of {work.num_rows} rows, in {len(work.shards)} shards, "
        f"with {work.settings.model.origin}"
    )
    progress = RowProgress(work.title, work.num_rows, work.num_rows - num_open)

    def give_up(name: str, row: WorkShard, reason: str) -> None:
        work.quarantine(name).add([RowFailure(row.asked_ids[0], "lost", reason)])

    results = work_off(
        config, stop, ModelWorker, work.settings, work.method, work.shards, progress, give_up
    )
    # Closed before Ray is, also when a result is refused.
    with contextlib.closing(results):
        for name, parts in results:
            result = _joined(cast("list[ShardResult[T]]", parts))
            work.quarantine(name).add(result.failures)
            failpoint("pass.before_save")
            work.save(name, result)
            failpoint("pass.after_shard")


def _joined(parts: Sequence[ShardResult[T]]) -> ShardResult[T]:
    """Returns what came of a shard that may have been cut: its parts are in the order of rows."""
    values = {name: value for part in parts for name, value in part.value_of_id.items()}
    failures = tuple(failure for part in parts for failure in part.failures)
    return ShardResult(values, failures, sum(part.num_halved for part in parts))


def work_off(
    config: Config,
    stop: StopRequest,
    worker: type,
    settings: object,
    method: str,
    shards: Mapping[str, CountedT],
    progress: RowProgress,
    give_up: Callable[[str, CountedT, str], None],
    gpus_per_actor: int = 1,
) -> Generator[tuple[str, list[object]], None, None]:
    """Yields (shard name, results of the worker's `method`) as shards finish, as `ActorPool.map`.

    Needs a `ray_session`. Raises StoppedError (75) within seconds of a request; shards that are at
    work are given up. Closing it ends the actors.
    """

    _take_signals(stop)  # again: `ray.init` has put handlers of its own in place, which abort

    def raise_if_asked() -> None:
        if stop.is_asked():
            raise StoppedError(
                "stopped on request; what is finished is saved, the same command goes on"
            )

    sizes = sizes_of(shards)
    with (
        progress,
        ActorPool[CountedT](
            worker, settings, config.ray, len(shards), progress.note, gpus_per_actor
        ) as pool,
    ):
        for name, results in pool.map(method, shards, raise_if_asked, give_up):
            yield name, results
            progress.advance(sizes[name], tokens_of(shards, name, method))
