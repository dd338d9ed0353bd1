"""Maps shards of work over Ray actors; a lost actor is replaced and its shard done again.

A row that kills its actor each time is found and given up (`shard_queue.py`). The driver keeps the
queue and holds the results: nothing is left to the object store, and Ray's own retries are off,
because they would repeat a shard that kills its actor for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, cast

from pocl_dist.config import RayConfig
from pocl_dist.distributed.shard_queue import MAX_ATTEMPTS, Piece, ShardQueue, ShardT
from pocl_dist.errors import ConfigError, PoclError, UnavailableError, WorkerError

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorClass, ActorHandle

# How long one wait for the actors lasts; between two of them Python sees signals.
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class ActorShape:
    """How many actors there are and what each of them takes."""

    num_actors: int
    num_cpus: int
    num_gpus: float


@dataclass(frozen=True)
class _Call(Generic[ShardT]):
    """What an actor is doing: being placed, loading, or working on a piece of a shard."""

    actor: ActorHandle
    piece: Piece[ShardT] | None
    is_placing: bool = False


def actor_shape(
    config: RayConfig, num_cpus: float, num_gpus: float, num_shards: int, gpus_per_actor: int = 1
) -> ActorShape:
    """Returns a cluster's actors: one per GPU, or as many as CPUs allow, unless the config says.

    More actors than GPUs share them in equal parts. Never more actors than shards. With several
    GPUs per actor there are as many actors as find theirs, ConfigError (64) when none does.
    """
    if gpus_per_actor > 1:
        if num_gpus < gpus_per_actor:
            raise ConfigError(
                f"teacher.devices_per_actor: {gpus_per_actor} GPUs for an actor, but Ray has "
                f"{int(num_gpus)}; lower it, or set teacher.cache_engine: zero3"
            )
        most = min(int(num_gpus) // gpus_per_actor, num_shards)
        return ActorShape(
            min(config.num_actors or most, most), config.cpus_per_actor, float(gpus_per_actor)
        )
    wanted = config.num_actors
    if wanted is None:
        wanted = int(num_gpus) if num_gpus >= 1 else max(1, int(num_cpus) // config.cpus_per_actor)
    share = 1 / -(-wanted // int(num_gpus)) if num_gpus >= 1 else 0.0
    return ActorShape(min(wanted, num_shards), config.cpus_per_actor, share)


def _reason(error: BaseException) -> str:
    """Returns the telling line of Ray's long account of a death."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "exit detail" in line or "Error" in line]
    line = (telling or lines or [type(error).__name__])[-1]
    return line.rpartition("exit detail:")[2].partition(" Some common causes")[0].strip()[:300]


class ActorPool(Generic[ShardT]):
    """The actors of one worker class. Needs a `ray_session`; its context ends them.

    The worker class has `__init__(settings)`, which is cheap, `start()`, which loads, and methods
    that take one shard. Exceptions of theirs that are PoclErrors arrive as they are.
    """

    def __init__(
        self,
        worker: type,
        settings: object,
        config: RayConfig,
        num_shards: int,
        note: Callable[[str], None],
        gpus_per_actor: int = 1,
    ) -> None:
        import ray

        resources = ray.cluster_resources()
        self.shape = actor_shape(
            config,
            resources.get("CPU", 1),
            resources.get("GPU", 0),
            num_shards,
            gpus_per_actor,
        )
        self._timeout_seconds = config.start_timeout_seconds
        self._worker = worker
        self._settings = settings
        self._note = note
        self._calls: dict[ObjectRef[object], _Call[ShardT]] = {}
        self._num_lost_starts = 0

    def __enter__(self) -> ActorPool[ShardT]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the actors, also those that are at work."""
        import ray

        for call in self._calls.values():
            ray.kill(call.actor)
        self._calls.clear()

    def map(
        self,
        method: str,
        shards: Mapping[str, ShardT],
        poll: Callable[[], None] = lambda: None,
        give_up: Callable[[str, ShardT, str], None] | None = None,
    ) -> Iterator[tuple[str, list[object]]]:
        """Yields (name, results of `method`) of every shard once done; idle actors take the next.

        There is one result, or one for each piece of a shard that had to be cut: after three lost
        actors it is halved, down to the row that kills; `give_up(name, row, reason)` is told of it.
        `poll` is called at least every second; what it or `give_up` raises ends the pass. Raises
        WorkerError (71) when actors die whatever they do, UnavailableError (69) when no actor
        finds a place in time.
        """
        import ray

        queue = ShardQueue(shards, self.shape.num_actors, self._note, give_up)
        for _ in range(self.shape.num_actors):
            self._place()
        last_placed = time.monotonic()
        while queue.num_open:
            poll()
            done, _ = ray.wait(list(self._calls), num_returns=1, timeout=POLL_SECONDS)
            if any(not call.is_placing for call in self._calls.values()):
                last_placed = time.monotonic()
            if not done:
                self._check_placed(last_placed)
                continue
            call = self._calls.pop(done[0])
            try:
                value = self._result(done[0])
            except _ActorLost as lost:
                ray.kill(call.actor)  # it may live: its result was lost, or its device is broken
                if call.piece is None:
                    self._count_lost_start(lost)
                else:
                    yield from queue.lost(call.piece, str(lost))
                self._place()
                continue
            self._send_next(call, method, queue)
            if call.piece is not None:
                yield from queue.done(call.piece, value)

    def _send_next(self, call: _Call[ShardT], method: str, queue: ShardQueue[ShardT]) -> None:
        import ray

        if call.is_placing:
            self._calls[call.actor.start.remote()] = _Call(call.actor, None)
            return
        if call.piece is None:
            self._num_lost_starts = 0
        piece = queue.take()
        if piece is not None:
            reference = getattr(call.actor, method).remote(piece.shard)
            self._calls[reference] = _Call(call.actor, piece)
        else:
            ray.kill(call.actor)

    def _place(self) -> None:
        import ray

        remote_class = cast("ActorClass[object]", ray.remote(self._worker))
        options = remote_class.options(
            num_cpus=self.shape.num_cpus,
            num_gpus=self.shape.num_gpus,
            max_restarts=0,
            max_task_retries=0,
        )
        actor = cast("ActorHandle", options.remote(self._settings))
        self._calls[actor.__ray_ready__.remote()] = _Call(actor, None, is_placing=True)

    def _check_placed(self, last_placed: float) -> None:
        if time.monotonic() - last_placed > self._timeout_seconds:
            raise UnavailableError(
                f"Ray found no place for an actor ({self.shape.num_cpus} CPUs, "
                f"{self.shape.num_gpus:g} GPUs) "
                f"within {self._timeout_seconds:g} s (ray.start_timeout_seconds)"
            )

    def _result(self, reference: ObjectRef[object]) -> object:
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            return ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, PoclError | OSError):
                raise error.cause from None
            if type(error.cause).__name__ == "AcceleratorError":  # of torch, which is not loaded
                raise _ActorLost(_reason(error)) from error
            raise
        except RayError as error:
            raise _ActorLost(_reason(error)) from error

    def _count_lost_start(self, lost: _ActorLost) -> None:
        """Raises WorkerError (71) when actors die before they have loaded, three times around."""
        self._num_lost_starts += 1
        most = MAX_ATTEMPTS * self.shape.num_actors
        what = f"an actor died before its first shard, attempt {self._num_lost_starts} of {most}"
        if self._num_lost_starts >= most:
            raise WorkerError(f"{what}: {lost}")
        self._note(f"{what}; trying again ({lost})")


class _ActorLost(Exception):
    """The actor, not its work, failed."""
