"""One pass of actors over shards, with progress, that a signal or the stop file ends cleanly."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from typing import Protocol, TypeVar

from pocl_dist.config import Config, EvaluateConfig
from pocl_dist.config.pass_sections import GenerateConfig
from pocl_dist.difficulty.work import WorkShard
from pocl_dist.difficulty.worker import ModelWorker, WorkerSettings
from pocl_dist.distributed.ray_pool import ActorPool
from pocl_dist.errors import StoppedError
from pocl_dist.models.generation import Sampling
from pocl_dist.models.sources import ModelFolder
from pocl_dist.pipeline.progress import RowProgress
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.pipeline.stop_request import StopRequest


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


class Shard(Protocol):
    """What an actor is sent."""

    @property
    def num_rows(self) -> int:
        """Returns the rows that count as done with it."""
        ...


ShardT = TypeVar("ShardT", bound=Shard)


def answer_shards(
    config: Config,
    stop: StopRequest,
    settings: WorkerSettings,
    method: str,
    shards: Mapping[str, WorkShard],
    progress: RowProgress,
) -> Iterator[tuple[str, object]]:
    """Yields (shard name, result of the ModelWorker's `method`) as shards finish."""
    return work_off(config, stop, ModelWorker, settings, method, shards, progress)


def work_off(
    config: Config,
    stop: StopRequest,
    worker: type,
    settings: object,
    method: str,
    shards: Mapping[str, ShardT],
    progress: RowProgress,
    gpus_per_actor: int = 1,
) -> Generator[tuple[str, object], None, None]:
    """Yields (shard name, result of the worker's `method`) as shards finish. Needs a `ray_session`.

    Raises StoppedError (75) within seconds of a request; shards that are at work are given up.
    Closing it ends the actors.
    """

    _take_signals(stop)  # again: `ray.init` has put handlers of its own in place, which abort

    def raise_if_asked() -> None:
        if stop.is_asked():
            raise StoppedError(
                "stopped on request; what is finished is saved, the same command goes on"
            )

    with (
        progress,
        ActorPool[ShardT](
            worker, settings, config.ray, len(shards), progress.note, gpus_per_actor
        ) as pool,
    ):
        for name, result in pool.map(method, shards, raise_if_asked):
            yield name, result
            progress.advance(shards[name].num_rows)
