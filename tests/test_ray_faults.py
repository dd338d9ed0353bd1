"""What kills processes: a node that is lost, actors one after the other, the driver. All slow."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from pocl_dist.config import Config
from pocl_dist.distributed import ray_session as session
from pocl_dist.pipeline import actor_pass
from pocl_dist.pipeline.difficulty_files import read_records
from pocl_dist.pipeline.measure import measure
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.records import DifficultyRecord
from tests import fixtures_models
from tests.fixtures_models import KillsItself, WaitsOnItsNode
from tests.test_ray_passes import files_of, make_all

pytestmark = pytest.mark.slow
Pair = tuple[Path, Path, Path]
ROOT = Path(__file__).parents[1]
# Most are gone in 3 seconds; agents of Ray that were still starting look for it a minute or two.
MAX_ORPHAN_SECONDS = 150.0


def records_of(run: RunDirectory) -> dict[str, DifficultyRecord]:
    return {record.example_id: record for record in read_records(run.difficulty)}


@pytest.fixture(scope="module")
def undisturbed(tiny_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    config, run = make_all(tmp_path_factory.mktemp("undisturbed"), tiny_pair)
    measure(config, run)
    return run


def with_actors(config: Config, num_actors: int, address: str | None = None) -> Config:
    section = config.ray.model_copy(update={"num_actors": num_actors, "address": address})
    return config.model_copy(update={"ray": section})


def test_every_actor_killed_once_or_twice_changes_nothing(
    undisturbed: RunDirectory, tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = make_all(tmp_path, tiny_pair)
    ray.cloudpickle.register_pickle_by_value(sys.modules[fixtures_models.__name__])
    monkeypatch.setattr(KillsItself, "folder", tmp_path)
    monkeypatch.setattr(KillsItself, "num_kills", 4)
    monkeypatch.setattr(actor_pass, "ModelWorker", KillsItself)
    measure(with_actors(config, 2), run)
    assert len(list(tmp_path.glob("kill-*"))) == 4
    assert records_of(run) == records_of(undisturbed)
    assert not (run.difficulty / "quarantine.jsonl").exists()


@contextlib.contextmanager
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Starts a cluster of two nodes with a CPU each on this machine, with token authentication."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    # The token of this process's earlier sessions: Ray reads one only once.
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(session._token_file()))
    ray._raylet.Config.initialize("")
    node = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
        yield cluster
    finally:
        cluster.shutdown()


def test_a_node_that_is_lost_changes_nothing(
    undisturbed: RunDirectory, tiny_pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = make_all(tmp_path, tiny_pair)
    ray.cloudpickle.register_pickle_by_value(sys.modules[fixtures_models.__name__])
    monkeypatch.setattr(WaitsOnItsNode, "folder", tmp_path)
    monkeypatch.setattr(actor_pass, "ModelWorker", WaitsOnItsNode)
    with two_nodes(monkeypatch) as cluster:

        def lose_the_second() -> None:
            deadline = time.monotonic() + 120
            while len(list(tmp_path.glob("node-*"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.1)
            (second,) = cluster.worker_nodes  # type: ignore[attr-defined]
            cluster.remove_node(second, allow_graceful=False)  # type: ignore[attr-defined]
            (tmp_path / "go").touch()

        thread = threading.Thread(target=lose_the_second)
        thread.start()
        measure(with_actors(config, 2, cluster.address), run)  # type: ignore[attr-defined]
        thread.join()
    assert len(list(tmp_path.glob("node-*"))) == 2
    assert records_of(run) == records_of(undisturbed)


def processes_of(mark: str) -> list[int]:
    """Returns the ids of processes that have inherited `mark` in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def run_step(step: str, config: Path, mark: str, failpoint: str | None = None) -> int:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "POCL_TEST_MARK": mark}
    if failpoint is not None:
        environment["POCL_FAILPOINT"] = failpoint
    command = [sys.executable, "-m", "pocl_dist", step, str(config)]
    return subprocess.run(command, env=environment, capture_output=True, timeout=280).returncode


@pytest.mark.parametrize("step", ["measure", "generate", "evaluate"])
def test_a_driver_that_is_killed_leaves_no_process_and_the_same_command_goes_on(
    tiny_pair: Pair, tmp_path: Path, step: str
) -> None:
    """Killed after its second shard, as by the kernel; then compared with a run left in peace."""
    runs = []
    for name in ("killed", "peace"):
        _, run = make_all(tmp_path / name, tiny_pair)
        train = tmp_path / name / "train.jsonl"
        train.write_bytes((tmp_path / "killed" / "train.jsonl").read_bytes())
        runs.append(run)
    killed, peace = runs
    config, mark = tmp_path / "killed" / "config.yaml", f"mark-{os.getpid()}-{step}"
    assert run_step(step, config, mark, "pass.after_shard=kill@2") == -signal.SIGKILL
    started = time.monotonic()
    while (left := processes_of(mark)) and time.monotonic() < started + MAX_ORPHAN_SECONDS:
        time.sleep(0.2)
    print(f"{step}: no process left {time.monotonic() - started:.1f} s after the kill")
    assert not left, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left]
    finished = {path: path.stat().st_mtime_ns for path in killed.root.rglob("shard-*.parquet")}
    assert run_step(step, config, mark) == 0
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
    assert run_step(step, tmp_path / "peace" / "config.yaml", mark) == 0
    assert files_of(killed) == files_of(peace) != {}
