"""One pass of actors over shards, with progress, that a signal or the stop file ends cleanly."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping

from pocl_dist.config import Config
from pocl_dist.difficulty.work import WorkShard
from pocl_dist.difficulty.worker import ModelWorker, WorkerSettings
from pocl_dist.distributed.ray_pool import ActorPool
from pocl_dist.errors import StoppedError
from pocl_dist.pipeline.progress import RowProgress
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.pipeline.stop_request import StopRequest

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@contextlib.contextmanager
def stop_request(run: RunDirectory) -> Iterator[StopRequest]:
    """Turns signals into a flag while the context lasts. A thread that is not the main one cannot."""
    stop = StopRequest(run)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop.install()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def answer_shards(
    config: Config,
    stop: StopRequest,
    settings: WorkerSettings,
    method: str,
    shards: Mapping[str, WorkShard],
    progress: RowProgress,
) -> Iterator[tuple[str, object]]:
    """Yields (shard name, result of the ModelWorker's `method`) as shards are done. Needs a `ray_session`.

    Raises StoppedError (75) within seconds of a request; shards that are at work are given up.
    """

    def raise_if_asked() -> None:
        if stop.is_asked():
            raise StoppedError("stopped on request; what is finished is saved, the same command goes on")

    with (
        progress,
        ActorPool[WorkShard](ModelWorker, settings, config.ray, len(shards), progress.note) as pool,
    ):
        for name, result in pool.map(method, shards, raise_if_asked):
            yield name, result
            progress.advance(shards[name].num_rows)
