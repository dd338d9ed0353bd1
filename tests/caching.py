"""Runs the real cache step, on actors and on ranks, and reads back what it wrote."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from pocl_dist.config import Config, load_config
from pocl_dist.pipeline.cache import cache
from pocl_dist.pipeline.plan import make_plan
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.records import EncodedExample
from pocl_dist.teacher.cache_files import read_index, read_shards, tensor_file
from pocl_dist.teacher.cache_work import CacheShard
from pocl_dist.teacher.cache_worker import CacheResult, CacheWorker
from tests.ranks import run_ranks
from tests.tiny import write_config

Pair = tuple[Path, Path, Path]
TEMPERATURES = [1.0, 1.5, 3.0]


def write_cache_config(folder: Path, pair: Pair, **sections: dict) -> Path:
    """Writes a config with a stage per temperature, and a cache of six shards."""
    curriculum = {
        "num_stages": 3,
        "epochs_per_stage": 1,
        "ordering": "shuffled",
        "temperature": TEMPERATURES,
    }
    defaults: dict[str, dict] = {
        "curriculum": curriculum,
        "teacher": {"source": "cache_hidden", "cache_batch_size": 2},
        "ray": {"num_actors": 2, "shard_size": 4},
    }
    merged = {name: {**keys, **sections.pop(name, {})} for name, keys in defaults.items()}
    return write_config(folder, *pair, **merged, **sections)


def planned(path: Path, *overrides: str) -> tuple[Config, RunDirectory]:
    """Returns the config and its run directory, with a plan in it."""
    config = load_config([path], overrides)
    run = RunDirectory(Path(config.run_dir))
    make_plan(config, run)
    return config, run


def cached(path: Path, *overrides: str) -> RunDirectory:
    """Plans and caches with Ray's actors; returns the run directory."""
    config, run = planned(path, *overrides)
    cache(config, run)
    return run


def copy_of(run: RunDirectory, folder: Path) -> RunDirectory:
    """Returns a run directory with the plan and the cache of another."""
    shutil.copytree(run.root, folder)
    return RunDirectory(folder)


def content(run: RunDirectory) -> dict[str, dict[str, torch.Tensor]]:
    """Returns {example id: {kind: its label positions}} of all that is cached."""
    folder = run.teacher_cache
    found = {}
    for example_id, place in read_index(read_shards(folder)).items():
        tensors = load_file(tensor_file(folder, place.shard))
        found[example_id] = {key: value[place.start : place.stop] for key, value in tensors.items()}
    return found


def assert_same_content(one: RunDirectory, other: RunDirectory, *, is_exact: bool = True) -> None:
    """Compares two caches row by row: the same bits, or nearly."""
    first, second = content(one), content(other)
    assert first.keys() == second.keys() and len(first) > 0
    for example_id, tensors in first.items():
        for key, value in tensors.items():
            tolerance = 0.0 if is_exact else 2e-5
            torch.testing.assert_close(
                second[example_id][key], value, rtol=tolerance, atol=tolerance
            )


def direct_logits(teacher: Path, example: EncodedExample, num_tokens: int) -> torch.Tensor:
    """Returns the teacher's logits (n, V) of a row's labels in float64, without our parts."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    with torch.no_grad():
        logits_TV = model(torch.tensor([example.token_ids])).logits[0, :, :num_tokens]
    return logits_TV[example.num_prompt_tokens - 1 : -1]


# ------------------------------------------------------------------------------------------ workers


class DiesOnce(CacheWorker):
    """A worker whose process ends once, between a shard's tensors and the JSON beside them."""

    def cache(self, shard: CacheShard) -> CacheResult:
        """Dies, or does what a worker does."""
        marker = self.settings.content.folder.parent / "died"
        entry = super().cache(shard)
        if not marker.exists():
            marker.touch()
            (self.settings.content.folder / f"{shard.name}.json").unlink()
            os._exit(9)
        return entry


class AsksToStop(CacheWorker):
    """A worker that touches the stop file once the first shard is written."""

    def cache(self, shard: CacheShard) -> CacheResult:
        """Does what a worker does, and asks."""
        entry = super().cache(shard)
        if shard.index == 0:
            stop = self.settings.content.folder.parent / "control" / "stop"
            stop.parent.mkdir(exist_ok=True)
            stop.touch()
        return entry


class Troubled(CacheWorker):
    """A teacher with memory for one row at a time, that fails on rows of certain ids."""

    failing: frozenset[str] = frozenset()  # the test sets it

    def cache(self, shard: CacheShard) -> CacheResult:
        """Does what a worker does, with less memory."""
        from pocl_dist.teacher import cache_worker

        row_hiddens = cache_worker.row_hiddens

        def troubled(model, batch, rows):  # type: ignore[no-untyped-def]
            if len(rows) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            if {batch.example_ids[row] for row in rows} & self.failing:
                raise IndexError("index out of range in self")
            return row_hiddens(model, batch, rows)

        cache_worker.row_hiddens = troubled  # of this actor's process alone
        try:
            return super().cache(shard)
        finally:
            cache_worker.row_hiddens = row_hiddens


class NotesItsGPUs(CacheWorker):
    """A worker that writes down which GPUs Ray gave it, and waits until another one did so too."""

    def start(self) -> str:
        """Does what a worker does, and notes."""
        import ray

        gpus = sorted(map(int, ray.get_gpu_ids()))
        folder = self.settings.content.folder.parent
        (folder / f"gpus-{os.getpid()}").write_text(" ".join(map(str, gpus)))
        deadline = time.monotonic() + 60
        while len(list(folder.glob("gpus-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        return super().start()


# -------------------------------------------------------------------------------------------- ranks


def _cache_rank(path: str, overrides: list[str], stop_after: int | None) -> None:
    from pocl_dist.errors import StoppedError
    from pocl_dist.pipeline import cache_rank as step

    config = load_config([path], overrides)
    run = RunDirectory(Path(config.run_dir))
    answer_round, num_rounds = step._answer_round, [0]

    def answer_and_touch(teacher, rank, job, shards) -> None:  # type: ignore[no-untyped-def]
        answer_round(teacher, rank, job, shards)
        num_rounds[0] += 1
        if num_rounds[0] == stop_after and rank.is_main:
            run.stop_file.parent.mkdir(exist_ok=True)
            run.stop_file.touch()

    step._answer_round = answer_and_touch
    try:
        step.cache_rank(config, run)
    except StoppedError:
        if stop_after is None:
            raise


def cached_by_ranks(
    path: Path, world_size: int, *overrides: str, stop_after: int | None = None
) -> RunDirectory:
    """Plans and caches with a teacher partitioned over ranks; returns the run directory."""
    _, run = planned(path, *overrides)
    run_ranks(_cache_rank, world_size, str(path), list(overrides), stop_after)
    run.stop_file.unlink(missing_ok=True)
    return run


def _distill_without_teacher(path: str, overrides: list[str]) -> None:
    from pocl_dist.pipeline import distill, student_engine, training

    def refuse(*_: object) -> None:
        raise AssertionError("the teacher's engine was built")

    load = student_engine.load_model
    training.OnlineTeacher = refuse  # type: ignore[assignment,misc]
    config = load_config([path], overrides)

    def load_student(source, dtype):  # type: ignore[no-untyped-def]
        assert str(source.folder) == config.models.student.path
        return load(source, dtype)

    student_engine.load_model = load_student  # type: ignore[assignment]
    distill.distill_rank(config, RunDirectory(Path(config.run_dir)))


def distill_from_cache(
    path: Path, world_size: int, run: RunDirectory, *overrides: str
) -> RunDirectory:
    """Trains on ranks that may not load the teacher; returns the run directory."""
    words = [f"run_dir={run.root}", *overrides]
    run_ranks(_distill_without_teacher, world_size, str(path), words)
    return run


def losses(rows: list[Mapping[str, float]]) -> torch.Tensor:
    """Returns the losses (steps, 4) of step rows, in fp64."""
    names = ("loss", "kd_loss", "ce_loss", "kl")
    return torch.tensor([[row[name] for name in names] for row in rows], dtype=torch.float64)
