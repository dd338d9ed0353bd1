"""Losses and gradients that are not finite: all ranks leave the step out, and no trace of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pocl_dist.config import load_config
from pocl_dist.config.training_sections import NonFiniteConfig
from pocl_dist.errors import DivergedError
from pocl_dist.files import read_json, read_json_lines
from pocl_dist.pipeline.plan import make_plan
from pocl_dist.pipeline.run_directory import RunDirectory
from tests.ranks import run_ranks, run_ranks_with_errors
from tests.tiny import write_config
from tests.training import checkpoint_tensors, step_rows

Pair = tuple[Path, Path, Path]

FAST = ["zero 0", "zero 3"]
SETTINGS = {
    "zero 0": ["engine.zero_stage=0"],
    "zero 1": ["engine.zero_stage=1"],
    "zero 2": ["engine.zero_stage=2"],
    "zero 3": ["engine.zero_stage=3"],
    "zero 1 bf16": ["engine.zero_stage=1", "engine.dtype=bf16"],
    "zero 2 bf16": ["engine.zero_stage=2", "engine.dtype=bf16"],
    "zero 3 bf16": ["engine.zero_stage=3", "engine.dtype=bf16"],
    "zero 2 offload": ["engine.zero_stage=2", "engine.offload_optimizer=cpu"],
    "zero 3 offload": ["engine.zero_stage=3", "engine.offload_optimizer=cpu"],
}


class _NotFiniteBackward(torch.autograd.Function):
    """The identity, with a gradient of NaN."""

    @staticmethod
    def forward(ctx: object, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")


@contextmanager
def injured(kind_of: Callable[[int], str | None]) -> Iterator[None]:
    """Injures the steps (counted from 0) of this rank for which `kind_of` names how.

    "never" is no injury but its oracle: the step is not tried at all.
    """
    from pocl_dist.pipeline import distill
    from pocl_dist.pipeline.student import StudentWithLoss
    from pocl_dist.pipeline.train_step import NotFinite
    from pocl_dist.teacher.online import OnlineTeacher

    rank, present = int(os.environ["RANK"]), [0]
    train_step, forward, answer = distill.train_step, StudentWithLoss.forward, OnlineTeacher.answer

    def step(engine, teacher, batches, number, instruction, its_rank):  # type: ignore[no-untyped-def]
        present[0] = instruction.step
        if kind_of(instruction.step) == "never":
            return NotFinite("never tried", [[0.0] * 4 for _ in batches])
        return train_step(engine, teacher, batches, number, instruction, its_rank)

    def injured_forward(self, *arguments):  # type: ignore[no-untyped-def]
        loss_sum, part_sums = forward(self, *arguments)
        kind = kind_of(present[0])
        if kind == "loss of rank 1" and rank == 1:
            loss_sum = loss_sum * float("nan")
        elif kind == "infinities of both signs":
            loss_sum = loss_sum + (-1) ** rank * float("inf")
        elif kind == "gradient of rank 0" and rank == 0:
            loss_sum = _NotFiniteBackward.apply(loss_sum)
        return loss_sum, part_sums

    @contextmanager
    def injured_answer(self, batch):  # type: ignore[no-untyped-def]
        with answer(self, batch) as output:
            if kind_of(present[0]) == "teacher of rank 1" and rank == 1:
                output.hidden_NH.fill_(float("nan"))
            yield output

    distill.train_step = step  # type: ignore[assignment]
    StudentWithLoss.forward = injured_forward  # type: ignore[method-assign]
    OnlineTeacher.answer = injured_answer  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        distill.train_step, StudentWithLoss.forward = train_step, forward  # type: ignore[method-assign]
        OnlineTeacher.answer = answer  # type: ignore[method-assign]


def _state(training) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    """Returns copies of weights as forward uses them, master weights, moments and step count."""
    from pocl_dist.distributed.engine import MOMENTS, adam_step
    from pocl_dist.distributed.parameters import master_parameters, moments, whole_parameters

    engine = training.engine
    named = {f"used.{name}": value.clone() for name, value in whole_parameters(engine.module)}
    named |= {f"master.{name}": value.clone() for name, value in master_parameters(engine)}
    for key in MOMENTS:
        named |= {f"{key}.{name}": value.clone() for name, value in moments(engine, key)}
    return named | {"adam step": torch.tensor(adam_step(engine))}


def _are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


INJURIES = (
    None,
    "loss of rank 1",
    "gradient of rank 0",
    None,
    "teacher of rank 1",
    "infinities of both signs",
    None,
)


def _train_around_injuries(path: str, names: list[str]) -> dict[str, list[str]]:
    """Returns what is wrong, by setting, on this rank."""
    from pocl_dist.distributed.collectives import barrier
    from pocl_dist.distributed.process_group import join_process_group
    from pocl_dist.pipeline import distill
    from pocl_dist.pipeline.prepare import prepare_training
    from pocl_dist.pipeline.rewind import go_back
    from pocl_dist.pipeline.save import save
    from pocl_dist.pipeline.stop_request import StopRequest

    rank, findings = join_process_group(60), {}
    for name in names:
        config = load_config([path], [*SETTINGS[name], f"run_dir={Path(path).parent / name}"])
        run = RunDirectory(Path(config.run_dir))
        ends = []
        for kinds in (INJURIES, [kind and "never" for kind in INJURIES]):
            training = prepare_training(config, run, rank)
            wrong: list[str] = []
            with injured(kinds.__getitem__):
                for kind in kinds:
                    before = _state(training) if kind else {}
                    instruction = training.coordinator.next_instruction(False, False)
                    distill._train(training, instruction, StopRequest(run, None))
                    if kind and not _are_equal(before, _state(training)):
                        wrong.append(f"step {instruction.step} ({kind})")
                    if instruction.step == 0:
                        save(training)
                        saved = _state(training)
            ends.append(_state(training))
            go_back(training, 1)
            if not _are_equal(saved, _state(training)):
                wrong.append("going back")
            instruction = training.coordinator.next_instruction(False, False)
            if (instruction.step, training.coordinator.is_passing) != (1, True):
                wrong.append("what is left out")
            training.close()
            findings.setdefault(name, []).extend(wrong)
            if rank.is_main:  # the next one starts anew
                shutil.rmtree(run.checkpoints)
            barrier(rank)
        if not _are_equal(*ends):
            findings[name].append("an injured step left something behind")
    return findings


@pytest.mark.parametrize(
    "names",
    [FAST, pytest.param([n for n in SETTINGS if n not in FAST], marks=pytest.mark.slow)],
    ids=["fast", "the others"],
)
def test_an_injured_step_changes_no_bit_on_any_rank_and_leaves_nothing_behind(
    tiny_pair: Pair, tmp_path: Path, names: list[str]
) -> None:
    # Micro-batches of two rows: what the first of a step has added up is dropped as well.
    path = write_config(
        tmp_path, *tiny_pair,
        engine={"micro_batch_size": 2, "global_batch_size": 8},
        curriculum={"num_stages": 2, "epochs_per_stage": 6, "ordering": "shuffled"},
        nonfinite={"max_in_row": 5},
    )  # fmt: skip
    for name in names:
        config = load_config([path], [f"run_dir={tmp_path / name}"])
        make_plan(config, RunDirectory(Path(config.run_dir)))
    for findings in run_ranks(_train_around_injuries, 2, str(path), names):
        assert findings == {name: [] for name in names}
    rows = read_json_lines(tmp_path / names[-1] / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "step"] == [1, 4, 7]
    skipped = [row for row in rows if row["kind"] == "step_skipped"]
    assert [row["step"] for row in skipped] == [2, 3, 5, 6]
    assert [row["num_in_row"] for row in skipped] == [1, 2, 1, 2]
    assert not any("loss" in row for row in skipped)


def _distill_injured(
    paths: list[str], overrides: list[str], kinds: dict[int, str], failpoint: str
) -> int:
    """Trains with injuries; returns the step that it came to."""
    from pocl_dist.pipeline import distill

    os.environ["POCL_FAILPOINT"] = failpoint
    config = load_config(paths, overrides)
    run = RunDirectory(Path(config.run_dir))
    with injured(kinds.get):
        distill.distill_rank(config, run)
    return int(max(run.checkpoint_steps()))


def distill_injured(
    config: Path, world_size: int, kinds: dict[int, str], *overrides: str, failpoint: str = ""
) -> tuple[RunDirectory, list]:
    """Returns the run directory and (value, error) of every rank."""
    loaded = load_config([config], overrides)
    run = RunDirectory(Path(loaded.run_dir))
    make_plan(loaded, run)
    rows = run_ranks_with_errors(
        _distill_injured, world_size, [str(config)], list(overrides), kinds, failpoint
    )
    return run, rows


def test_too_many_in_a_row_end_all_ranks_with_ids_stage_temperature_and_a_dump(
    tiny_pair: Pair, tmp_path: Path
) -> None:
    kinds = dict.fromkeys(range(4, 9), "loss of rank 1")
    config = write_config(tmp_path, *tiny_pair, checkpoint={"every": 2}, nonfinite={"max_dumps": 2})
    run, rows = distill_injured(config, 2, kinds)
    errors = [error for _, error in rows]
    assert [error[0] for error in errors] == ["DivergedError"] * 2
    skipped = [row for row in read_json_lines(run.metrics) if row["kind"] == "step_skipped"]
    assert [row["step"] for row in skipped] == [5, 6, 7]
    ids = skipped[-1]["example_ids"]
    for _, message, _ in errors:
        assert message.startswith("step 7, stage 1, temperature 2: the loss is not finite")
        assert "rank(s) 1" in message and "3 in a row" in message
        assert f"examples {', '.join(ids[:5])}" in message
        assert "nonfinite.rewind=true" in message
    names = [f"step-00000{step}-rank-0000{rank}.json" for step in (5, 6) for rank in (0, 1)]
    assert sorted(path.name for path in run.nonfinite.iterdir()) == names
    dump = read_json(run.nonfinite / names[1])
    of_rank_1 = [row["example_id"] for part in dump["micro_batches"] for row in part["examples"]]
    # Only that rank's rows are suspected; all that it was about to train on is written down.
    assert sorted(skipped[0]["example_ids"]) == sorted(of_rank_1)
    assert {part["loss_sum"] for part in dump["micro_batches"]} == {"nan"}
    assert all(isinstance(part["ce_loss_sum"], float) for part in dump["micro_batches"])
    assert dump["micro_batches"][0]["examples"][0]["token_ids"]
    status = read_json(run.status)
    assert (status["step"], status["num_skipped"], status["last_checkpoint"]) == (7, 3, 4)
    assert run.checkpoint_steps() == [3, 4]  # none in the row: it would hold the same weights


# Nine steps, three in the first stage; two in a row are too many.
REWINDING = {"checkpoint": {"every": 2}, "nonfinite": {"rewind": True, "max_in_row": 2}}


def test_a_rewound_run_is_one_that_never_took_the_steps_since_the_checkpoint(
    tiny_pair: Pair, tmp_path: Path
) -> None:
    # Steps 6 and 7 are bad; step 5 led to their weights.
    kinds = dict.fromkeys((5, 6), "infinities of both signs")
    # Saves are still being written when the bad steps come: the newest is waited for.
    saving = REWINDING | {"checkpoint": {"every": 2, "asynchronous": True}}
    path = write_config(tmp_path / "rewound", *tiny_pair, **saving)
    # It breaks off among the bad steps, and decides the same when it is resumed.
    run, rows = distill_injured(path, 1, kinds, failpoint="train.before_step=enospc@7")
    assert rows[0][1][0] == "OSError"
    assert run.checkpoint_steps()[-1] == 4
    run, rows = distill_injured(path, 1, kinds)
    assert rows[0][1] is None, rows[0][1][2]
    rewinds = [row for row in read_json_lines(run.metrics) if row["kind"] == "rewind"]
    assert [(row["step"], row["checkpoint"]) for row in rewinds] == [(7, 4)]
    assert [row["step"] for row in step_rows(run)] == [1, 2, 3, 4, 5, 8, 9]

    path = write_config(tmp_path / "never", *tiny_pair, nonfinite={"max_in_row": 4})
    never, rows = distill_injured(path, 1, dict.fromkeys((4, 5, 6), "never"))
    assert rows[0][1] is None, rows[0][1][2]
    assert _are_equal(checkpoint_tensors(run), checkpoint_tensors(never))


@pytest.mark.slow
def test_a_run_ends_when_it_may_not_go_back_again_or_has_nowhere_to_go(
    tiny_pair: Pair, tmp_path: Path
) -> None:
    config = write_config(tmp_path, *tiny_pair, **REWINDING)
    once = "nonfinite.max_rewinds=1"
    kinds = dict.fromkeys(range(9), "infinities of both signs")
    run, rows = distill_injured(config, 1, kinds, once)
    assert rows[0][1][0] == "DivergedError" and "after 0 rewind(s)" in rows[0][1][1]
    assert run.checkpoint_steps() == []
    run, rows = distill_injured(config, 1, {s: k for s, k in kinds.items() if s > 3}, once)
    assert rows[0][1][0] == "DivergedError" and "after 1 rewind(s)" in rows[0][1][1]
    skipped = [row for row in read_json_lines(run.metrics) if row["kind"] == "step_skipped"]
    assert [row["step"] for row in skipped] == [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("rewind", "num_rewinds", "checkpoints", "target"),
    [
        (True, 0, [2, 4, 6, 8], 4),  # after step 6 nothing was changed
        (True, 1, [2, 4], 4),
        (True, 2, [2, 4], None),
        (True, 0, [6, 8], None),
        (False, 0, [2, 4], None),
    ],
)
def test_it_goes_back_to_before_the_last_step_that_changed_a_weight(
    gloo_rank: object,
    tmp_path: Path,
    rewind: bool,
    num_rewinds: int,
    checkpoints: list[int],
    target: int | None,
) -> None:
    from pocl_dist.curriculum.coordinator import Progress
    from pocl_dist.distributed.checkpoint_write import CheckpointWriter
    from pocl_dist.pipeline.rewind import step_to_go_back_to

    for step in checkpoints:
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    progress = Progress(step=9, num_skipped_in_row=3, num_rewinds=num_rewinds)
    training = SimpleNamespace(
        config=SimpleNamespace(nonfinite=NonFiniteConfig(rewind=rewind)),
        coordinator=SimpleNamespace(progress=progress),
        run=RunDirectory(tmp_path),
        rank=gloo_rank,
        writer=CheckpointWriter(tmp_path / "checkpoints", gloo_rank, lambda: None),
    )
    assert step_to_go_back_to(training) == target  # type: ignore[arg-type]


def test_only_steps_that_are_not_finite_make_a_row_and_an_overflow_does_not_break_it() -> None:
    from pocl_dist.curriculum.coordinator import Coordinator

    coordinator = Coordinator((), None, None, has_dev=False)  # type: ignore[arg-type]
    rows = []
    for is_skipped, is_overflow in ((1, 0), (0, 1), (1, 0), (0, 0), (1, 0)):
        coordinator.record_step(is_skipped=bool(is_skipped), is_overflow=bool(is_overflow))
        rows.append(coordinator.progress.num_skipped_in_row)
    assert rows == [1, 1, 2, 0, 1]
    assert (coordinator.progress.num_skipped, coordinator.progress.num_overflows) == (3, 1)


def test_an_fp16_overflow_at_the_lowest_loss_scale_diverges_instead_of_being_a_bug() -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    from pocl_dist.distributed.gradients import update

    scaler = DynamicLossScaler(1.0, 1000, 1.0, 1, False)

    class Engine:  # fp16 trains on GPUs only; the error is DeepSpeed's own
        def zero_optimization(self) -> bool:
            return True

        def step(self) -> None:
            scaler.update_scale(True)

    with pytest.raises(DivergedError, match="lowest loss scale"):
        update(Engine(), None)  # type: ignore[arg-type]
