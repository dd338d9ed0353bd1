"""Maps shards of work over Ray actors; a lost actor is replaced and its shard done again.

The driver keeps the queue and holds the results: nothing is left to the object store, and Ray's own
retries are off, because they would repeat a shard that kills its actor for ever.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from pocl_dist.config import RayConfig
from pocl_dist.errors import ConfigError, PoclError, UnavailableError, WorkerError

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorClass, ActorHandle

ShardT = TypeVar("ShardT")

MAX_ATTEMPTS = 3
# How long one wait for the actors lasts; between two of them Python sees signals.
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class ActorShape:
    """How many actors there are and what each of them takes."""

    num_actors: int
    num_cpus: int
    num_gpus: float


@dataclass(frozen=True)
class _Call:
    """What an actor is doing: being placed, loading, or working on the shard of that name."""

    actor: ActorHandle
    shard_name: str | None
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
        self._calls: dict[ObjectRef[object], _Call] = {}

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
        self, method: str, shards: Mapping[str, ShardT], poll: Callable[[], None] = lambda: None
    ) -> Iterator[tuple[str, object]]:
        """Yields (name, result of `method`) of every shard once done; an idle actor takes the next.

        `poll` is called at least every second; what it raises ends the pass. Raises
        WorkerError (71) when a shard has lost its actor three times, UnavailableError (69)
        when no actor finds a place in time.
        """
        import ray

        waiting = deque(shards)
        num_lost: Counter[str | None] = Counter()
        num_open = len(shards)
        for _ in range(self.shape.num_actors):
            self._place()
        last_placed = time.monotonic()
        while num_open:
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
                self._count_lost(num_lost, call, lost)
                if call.shard_name is not None:
                    waiting.appendleft(call.shard_name)
                self._place()
                continue
            self._send_next(call, method, shards, waiting)
            if call.shard_name is not None:
                num_open -= 1
                yield call.shard_name, value

    def _send_next(
        self, call: _Call, method: str, shards: Mapping[str, ShardT], waiting: deque[str]
    ) -> None:
        import ray

        if call.is_placing:
            self._calls[call.actor.start.remote()] = _Call(call.actor, None)
        elif waiting:
            name = waiting.popleft()
            self._calls[getattr(call.actor, method).remote(shards[name])] = _Call(call.actor, name)
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
            raise
        except RayError as error:
            raise _ActorLost(_reason(error)) from error

    def _count_lost(self, num_lost: Counter[str | None], call: _Call, lost: _ActorLost) -> None:
        num_lost[call.shard_name] += 1
        number = num_lost[call.shard_name]
        what = (
            f"{call.shard_name}: its actor died"
            if call.shard_name
            else "an actor died before its first shard"
        )
        if number >= MAX_ATTEMPTS:
            raise WorkerError(f"{what}, attempt {number} of {MAX_ATTEMPTS}: {lost}")
        self._note(f"{what}, attempt {number} of {MAX_ATTEMPTS}; trying again ({lost})")


class _ActorLost(Exception):
    """The actor, not its work, failed."""
