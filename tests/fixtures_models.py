"""Runs over tiny models for the tests of measure and evaluate, and workers that fail on purpose."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from pocl_dist.config import Config, RayConfig, load_config
from pocl_dist.difficulty.work import WorkBatch, WorkShard
from pocl_dist.difficulty.worker import ModelWorker, ShardResult
from pocl_dist.distributed.ray_session import ray_session
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.records import DifficultyRecord
from tests.tiny import WORDS, write_config


@pytest.fixture(scope="module")
def ray_of_module() -> Iterator[None]:
    """Holds one Ray for all tests of a module; the steps' own sessions join it."""
    with ray_session(RayConfig(num_actors=2)):
        yield


def make_run(
    folder: Path, student: Path, train: Path, teacher: Path | None, **sections: object
) -> tuple[Config, RunDirectory]:
    """Returns the config of a small run with a curriculum of two stages, and its run directory."""
    curriculum = {"num_stages": 2, "epochs_per_stage": 2, "ordering": "curriculum"}
    ray = {"num_actors": 2, "shard_size": 8}
    for name, defaults in (("curriculum", curriculum), ("ray", ray)):
        sections[name] = {**defaults, **sections.get(name, {})}  # type: ignore[dict-item]
    config = load_config([write_config(folder, teacher, student, train, **sections)])
    return config, RunDirectory(Path(config.run_dir))


def write_varied_rows(path: Path, num_rows: int = 24) -> Path:
    """Writes rows that all differ; random students say some of the last three words at times."""
    lines = []
    for index in range(num_rows):
        words = [
            WORDS[(index * 5 + k * (1 + index // 21)) % len(WORDS)] for k in range(1 + index % 6)
        ]
        row = {
            "id": f"row-{index:03d}",
            "instruction": " ".join(["say", *words]),
            "output": " ".join([*words, "it on the"]),
        }
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return path


class DiesOnce(ModelWorker):
    """A worker whose process ends the first time that it is given the first batch."""

    marker = Path()  # where it notes that it has died; the test sets it

    def measure(self, shard: WorkShard) -> ShardResult[DifficultyRecord]:
        """Dies, or does what a worker does."""
        if shard.batches[0].index == 0 and not self.marker.exists():
            self.marker.touch()
            os._exit(9)
        return super().measure(shard)


class Troubled(ModelWorker):
    """A worker with memory for `max_rows` rows, that fails and dies on the rows of certain ids.

    The test sets the attributes.
    """

    max_rows = 1000
    failing: frozenset[str] = frozenset()
    deadly: frozenset[str] = frozenset()

    def _answers(self, batch: WorkBatch, rows: Sequence[int], pass_seed: int) -> list[str]:
        self._meet(batch, rows)
        return super()._answers(batch, rows, pass_seed)

    def _measure_rows(self, batch: WorkBatch, rows: Sequence[int]) -> list[DifficultyRecord]:
        self._meet(batch, rows)
        return super()._measure_rows(batch, rows)

    def _meet(self, batch: WorkBatch, rows: Sequence[int]) -> None:
        ids = {batch.examples[row].example_id for row in rows}
        if ids & self.deadly:
            os._exit(9)
        if len(rows) > self.max_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")
        if ids & self.failing:
            raise IndexError("index out of range in self")


class WaitsOnItsNode(ModelWorker):
    """A worker that notes its node and waits, in its first shard, until the test lets it go on."""

    folder = Path()  # the test sets it

    def measure(self, shard: WorkShard) -> ShardResult[DifficultyRecord]:
        """Waits, then does what a worker does."""
        import ray

        (self.folder / f"node-{ray.get_runtime_context().get_node_id()}").touch()
        while not (self.folder / "go").exists():
            time.sleep(0.05)
        return super().measure(shard)


class KillsItself(ModelWorker):
    """A worker that is killed in the middle of its first shard, `num_kills` times in all."""

    folder = Path()  # the test sets it
    num_kills = 0

    def _measure_rows(self, batch: WorkBatch, rows: Sequence[int]) -> list[DifficultyRecord]:
        for number in range(self.num_kills):
            try:
                (self.folder / f"kill-{number}").touch(exist_ok=False)
            except FileExistsError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._measure_rows(batch, rows)
