"""The actor pool on a real local Ray: queue, lost actors, errors, and who may talk to it."""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from pocl_dist.config import RayConfig
from pocl_dist.distributed import ray_session as session
from pocl_dist.distributed.ray_pool import ActorPool, actor_shape
from pocl_dist.distributed.ray_reachable import check_reachable
from pocl_dist.distributed.ray_session import ray_session
from pocl_dist.errors import (
    ConfigError,
    DataError,
    StoppedError,
    UnavailableError,
    WorkerError,
)
from pocl_dist.files import atomic_write_text, explain_storage_error
from tests.listening import listeners

CONFIG = RayConfig(num_actors=2, start_timeout_seconds=60.0)


@dataclass(frozen=True)
class Words:
    """A shard of words; some are orders to fail."""

    words: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        return len(self.words)

    def halves(self) -> list[Words]:
        middle = len(self.words) // 2
        return [Words(self.words[:middle]), Words(self.words[middle:])] if middle else []


class AcceleratorError(RuntimeError):
    """Named as torch's: after it no call on the device works."""


class Doubler:
    """Doubles words."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self) -> None:
        """Has nothing to load."""

    def work(self, shard: Words) -> list[str]:
        """Returns each word twice, or does what it says."""
        marker = self.folder / "died"
        if "die" in shard.words or ("die once" in shard.words and not marker.exists()):
            marker.touch()
            os._exit(9)
        if "break once" in shard.words and not marker.exists():
            marker.touch()
            raise AcceleratorError("CUDA error: device-side assert triggered")
        if "bad row" in shard.words:
            raise DataError("train.jsonl:3: is bad")
        if "full disk" in shard.words:
            os.environ["POCL_FAILPOINT"] = "atomic_write.before_rename=enospc"
            atomic_write_text(self.folder / "full", "text")
        return [2 * word for word in shard.words]


def one(word: str) -> Words:
    return Words((word,))


@pytest.fixture(scope="module")
def ray_pool() -> Iterator[Callable[..., ActorPool[object]]]:
    with ray_session(CONFIG):
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        yield lambda folder, config=CONFIG, note=print: ActorPool(Doubler, folder, config, 6, note)


def test_every_shard_is_done_once(
    ray_pool: Callable[..., ActorPool[object]], tmp_path: Path
) -> None:
    with ray_pool(tmp_path) as pool:
        results = list(pool.map("work", {f"shard {n}": one(f"{n}") for n in range(6)}))
    assert sorted(results) == [(f"shard {n}", [[f"{n}{n}"]]) for n in range(6)]


@pytest.mark.parametrize(
    ("word", "reason"), [("die once", "attempt 1 of 3; trying again"), ("break once", "CUDA error")]
)
def test_a_lost_shard_is_done_again(
    ray_pool: Callable[..., ActorPool[object]], tmp_path: Path, word: str, reason: str
) -> None:
    notes: list[str] = []
    with ray_pool(tmp_path, note=notes.append) as pool:
        shards = {"a": one("1"), "b": one(word), "c": one("3")}
        results = dict(pool.map("work", shards))
    assert results == {"a": [["11"]], "b": [[2 * word]], "c": [["33"]]}
    assert len(notes) == 1 and notes[0].startswith("b: its actor died, attempt 1 of 3")
    assert reason in notes[0]


def test_a_shard_that_kills_its_actor_each_time_is_named(
    ray_pool: Callable[..., ActorPool[object]], tmp_path: Path
) -> None:
    with (
        ray_pool(tmp_path) as pool,
        pytest.raises(WorkerError, match=r"^b: its actor died, attempt 3 of 3"),
    ):
        list(pool.map("work", {"a": one("1"), "b": one("die")}))


def test_the_row_that_kills_is_found_and_the_others_of_its_shard_are_done(
    ray_pool: Callable[..., ActorPool[object]], tmp_path: Path
) -> None:
    given_up: list[tuple[str, Words, str]] = []
    notes: list[str] = []
    shards = {"a": Words(("1", "2", "die", "3")), "b": one("4")}
    with ray_pool(tmp_path, note=notes.append) as pool:
        results = dict(pool.map("work", shards, give_up=lambda *row: given_up.append(row)))
    assert results == {"a": [["11", "22"], ["33"]], "b": [["44"]]}
    assert [row[:2] for row in given_up] == [("a", one("die"))]
    assert "its actor died, attempt 2 of 2" in given_up[0][2]
    assert len(notes) == 3 + 1 + 1  # the shard's, its second half's, the row's first


def test_an_error_of_ours_keeps_class_and_message(
    ray_pool: Callable[..., ActorPool[object]], tmp_path: Path
) -> None:
    with ray_pool(tmp_path) as pool, pytest.raises(DataError) as caught:
        list(pool.map("work", {"a": one("bad row")}))
    assert (type(caught.value), str(caught.value)) == (DataError, "train.jsonl:3: is bad")


def test_a_full_disk_in_an_actor_arrives_with_its_path(
    ray_pool: Callable[..., ActorPool[object]], tmp_path: Path
) -> None:
    with ray_pool(tmp_path) as pool, pytest.raises(OSError) as caught:
        list(pool.map("work", {"a": one("full disk")}))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "full"))
    assert str(explain_storage_error(caught.value)).startswith("disk full while writing")


def test_what_poll_raises_ends_the_pass(
    ray_pool: Callable[..., ActorPool[object]], tmp_path: Path
) -> None:
    def stop() -> None:
        raise StoppedError("stop")

    with ray_pool(tmp_path) as pool, pytest.raises(StoppedError):
        list(pool.map("work", {"a": one("1")}, stop))


def test_actors_that_find_no_place_in_time_are_unavailable(
    ray_pool: Callable[..., ActorPool[object]], tmp_path: Path
) -> None:
    config = RayConfig(num_actors=1, cpus_per_actor=64, start_timeout_seconds=1.0)
    with (
        ray_pool(tmp_path, config) as pool,
        pytest.raises(UnavailableError, match=r"64 CPUs, 0 GPUs\) within 1 s"),
    ):
        list(pool.map("work", {"a": one("1")}))


@pytest.mark.usefixtures("ray_pool")
def test_the_token_is_ours_alone_and_in_no_command_line() -> None:
    file = session._token_file()
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
    assert os.environ["RAY_AUTH_MODE"] == "token"
    token = file.read_text().encode()
    lines = [
        path.read_bytes()
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if os.access(path, os.R_OK)
    ]
    assert not any(token in line for line in lines)


@pytest.mark.usefixtures("ray_pool")
@pytest.mark.parametrize(
    ("given", "is_welcome"),
    [
        ({}, True),
        ({"RAY_AUTH_MODE": "disabled"}, False),
        ({"RAY_AUTH_TOKEN": "0" * 64, "RAY_AUTH_TOKEN_PATH": ""}, False),
    ],
)
def test_ray_talks_to_those_with_our_token_only(given: dict[str, str], is_welcome: bool) -> None:
    code = (
        "import sys; from ray._raylet import GcsClient; "
        "GcsClient(address=sys.argv[1]); print('joined')"
    )
    command = [sys.executable, "-c", code, ray.get_runtime_context().gcs_address]
    done = subprocess.run(command, env={**os.environ, **given}, capture_output=True, text=True)
    assert ("joined" in done.stdout) is is_welcome
    assert ("InvalidAuthToken" in done.stderr) is not is_welcome


@pytest.mark.usefixtures("ray_pool")
def test_a_cluster_with_our_token_can_be_joined() -> None:
    check_reachable(ray.get_runtime_context().gcs_address, 60.0)


@pytest.mark.usefixtures("ray_pool")
def test_dashboard_and_job_server_are_off_and_no_port_answers_without_the_token() -> None:
    found = listeners(os.getpid())
    assert len(found) > 2, "Ray listens somewhere"
    ports = {port for _, port in found}
    assert not ports & {8265, 10001, 6379}, "dashboard, Ray client and the usual GCS port"
    for address, port in sorted(found):
        with contextlib.suppress(OSError, http.client.HTTPException):  # gRPC is no HTTP/1
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
            connection.request("GET", "/api/jobs/")
            reply = connection.getresponse()
            assert reply.status >= 400, f"{address}:{port} answers: {reply.read(200)!r}"
    if os.environ.get("POCL_TEST_NETWORK") == "loopback":
        assert Path("/proc/self/net/dev").read_text().count(":") == 1


@pytest.mark.parametrize(
    ("address", "kind", "message"),
    [
        (
            "127.0.0.1:1",
            UnavailableError,
            r"cannot reach Ray at 127\.0\.0\.1:1 within 20 s \(token: ",
        ),
        ("nowhere", ConfigError, "'nowhere' is not allowed: 'auto', or the head's HOST:PORT"),
    ],
)
def test_an_address_without_ray_is_one_line(
    address: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        check_reachable(address, 20.0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "num_cpus", "num_gpus", "num_shards", "expected"),
    [
        (RayConfig(), 8, 0, 100, (8, 1, 0.0)),
        (RayConfig(cpus_per_actor=3), 8, 0, 100, (2, 3, 0.0)),
        (RayConfig(cpus_per_actor=16), 8, 0, 100, (1, 16, 0.0)),
        (RayConfig(), 8, 4, 100, (4, 1, 1.0)),
        (RayConfig(), 8, 4, 3, (3, 1, 1.0)),
        (RayConfig(num_actors=2), 8, 4, 100, (2, 1, 1.0)),
        (RayConfig(num_actors=3), 8, 2, 100, (3, 1, 0.5)),
    ],
)
def test_there_is_one_actor_per_gpu_or_as_many_as_the_cpus_allow(
    config: RayConfig,
    num_cpus: float,
    num_gpus: float,
    num_shards: int,
    expected: tuple[int, int, float],
) -> None:
    shape = actor_shape(config, num_cpus, num_gpus, num_shards)
    assert (shape.num_actors, shape.num_cpus, shape.num_gpus) == expected


def test_threads_that_are_not_the_main_one_get_no_signals(tmp_path: Path) -> None:
    from pocl_dist.pipeline.actor_pass import stop_request
    from pocl_dist.pipeline.run_directory import RunDirectory

    asked: list[bool] = []

    def ask() -> None:
        with stop_request(RunDirectory(tmp_path), None) as stop:
            asked.append(stop.is_asked())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert asked == [False]


def test_a_ray_daemon_that_dies_while_it_starts_is_unreachable_not_a_bug(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    def die(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nmore")  # as ray/node.py does

    monkeypatch.setattr(ray, "init", die)
    with pytest.raises(UnavailableError, match=r"could not be started: The current node timed"):
        session._start_local(CONFIG)
