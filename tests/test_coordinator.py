"""The coordinator's decisions, without any training: the same sequence whatever interrupts it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from pocl_dist.config import load_config
from pocl_dist.curriculum.agreement import agree, applied_digest
from pocl_dist.curriculum.coordinator import (
    Action,
    Coordinator,
    Instruction,
    Progress,
)
from pocl_dist.records import Stage
from tests.tiny import write_config

STAGES = (Stage(0, 4, 1.0, 0.7, 1, 2), Stage(1, 8, 2.0, 1.0, 1, 3))


@pytest.fixture
def rank(gloo_rank: object) -> object:
    return gloo_rank


def make(
    tmp_path: Path,
    rank: object,
    has_dev: bool = False,
    has_quarters: bool = False,
    **sections: object,
) -> Coordinator:
    config = load_config([write_config(tmp_path, Path("t"), Path("s"), Path("r"), **sections)])
    return Coordinator(STAGES, config, rank, has_dev, has_quarters)  # type: ignore[arg-type]


def walk(
    coordinator: Coordinator, dev_values: list[float] | None = None, stop_at: int = -1
) -> list[tuple]:
    """Follows it to FINISH or STOP; returns (action, step, stage, resets) of each instruction."""
    seen, values = [], list(dev_values or [])
    while True:
        instruction = coordinator.next_instruction(coordinator.progress.step == stop_at, False)
        seen.append(
            (
                instruction.action.name,
                instruction.step,
                instruction.stage,
                instruction.resets_optimizer,
            )
        )
        if instruction.action == Action.TRAIN:
            coordinator.record_step()
        elif instruction.action == Action.SAVE:
            coordinator.record_save()
        elif instruction.action == Action.EVALUATE:
            coordinator.record_dev(values.pop(0))
        elif instruction.action == Action.QUARTERS:
            coordinator.record_quarters()
        else:
            return seen


def test_stages_follow_each_other_with_a_save_at_each_end_and_a_reset_at_each_start(
    tmp_path: Path, rank: object
) -> None:
    assert walk(make(tmp_path, rank)) == [
        ("TRAIN", 0, 0, False),
        ("TRAIN", 1, 0, False),
        ("SAVE", 2, 0, False),
        ("TRAIN", 2, 1, True),
        ("TRAIN", 3, 1, False),
        ("TRAIN", 4, 1, False),
        ("SAVE", 5, 1, False),
        ("FINISH", 5, 1, False),
    ]


def test_the_optimizer_is_kept_when_the_config_says_so(tmp_path: Path, rank: object) -> None:
    coordinator = make(
        tmp_path, rank, curriculum={"num_stages": 2, "optimizer": "keep", "ordering": "shuffled"}
    )
    assert not any(resets for *_, resets in walk(coordinator))


@pytest.mark.parametrize("stop_at", range(6))
def test_a_run_stopped_anywhere_and_resumed_trains_the_same_steps(
    tmp_path: Path, rank: object, stop_at: int
) -> None:
    def trained(rows: list[tuple]) -> list[tuple]:
        return [row for row in rows if row[0] == "TRAIN"]

    whole = trained(walk(make(tmp_path, rank)))
    first = make(tmp_path, rank)
    before = walk(first, stop_at=stop_at)
    assert before[-1][0] == ("STOP" if stop_at < 5 or before[-1][0] == "STOP" else "FINISH")
    second = make(tmp_path, rank)
    second.progress = Progress(**asdict(first.progress))
    assert trained(before) + trained(walk(second)) == whole


def test_quarters_are_scored_at_the_start_and_at_stage_ends_after_dev_and_before_the_save(
    tmp_path: Path, rank: object
) -> None:
    dev = {"every": 1, "quarter_rows": 1}
    rows = walk(make(tmp_path, rank, True, True, dev=dev), dev_values=[1.0] * 6)
    others = [(name, step) for name, step, *_ in rows if name not in ("TRAIN", "FINISH")]
    assert [step for name, step in others if name == "QUARTERS"] == [0, 2, 5]
    at_end = [name for name, step in others if step == 2]
    assert at_end == ["EVALUATE", "QUARTERS", "SAVE"]


@pytest.mark.parametrize("stop_at", range(6))
def test_a_stop_scores_quarters_later_and_none_twice(
    tmp_path: Path, rank: object, stop_at: int
) -> None:
    first = make(tmp_path, rank, has_quarters=True)
    before = walk(first, stop_at=stop_at)
    second = make(tmp_path, rank, has_quarters=True)
    second.progress = Progress(**asdict(first.progress))
    rows = before + (walk(second) if before[-1][0] == "STOP" else [])
    assert [step for name, step, *_ in rows if name == "QUARTERS"] == [0, 2, 5]


def test_the_dev_metric_is_taken_at_the_start_every_few_steps_and_at_stage_ends(
    tmp_path: Path, rank: object
) -> None:
    coordinator = make(
        tmp_path, rank, has_dev=True, data={"dev": "d"}, dev={"metric": "rouge_l", "every": 2}
    )
    rows = walk(coordinator, dev_values=[1.0, 5.0, 3.0, 4.0])
    assert [step for action, step, *_ in rows if action == "EVALUATE"] == [0, 2, 4, 5]
    assert (coordinator.progress.best_dev, coordinator.progress.best_step) == (5.0, 2)


def test_a_stage_without_gain_for_patience_evaluations_ends(tmp_path: Path, rank: object) -> None:
    curriculum = {"num_stages": 2, "ordering": "shuffled", "advance": "converged", "patience": 1}
    coordinator = make(
        tmp_path,
        rank,
        has_dev=True,
        data={"dev": "d"},
        dev={"metric": "loss", "every": 1},
        curriculum=curriculum,
    )
    # loss: lower is better. Stage 1: first look sets the mark, the second (equal)
    # ends it after step 2 of 3.
    rows = walk(coordinator, dev_values=[9.0, 8.0, 7.0, 6.0, 6.0])
    assert [(step, stage) for action, step, stage, _ in rows if action == "TRAIN"] == [
        (0, 0),
        (1, 0),
        (2, 1),
        (3, 1),
    ]
    assert rows[-1][0] == "FINISH"


def test_the_learning_rate_restarts_its_cosine_in_every_stage(tmp_path: Path, rank: object) -> None:
    coordinator = make(tmp_path, rank)
    rates = []
    while (instruction := coordinator.next_instruction(False, False)).action != Action.FINISH:
        if instruction.action == Action.TRAIN:
            rates.append(instruction.learning_rate)
            coordinator.record_step()
        else:
            coordinator.record_save()
    assert rates[0] == rates[2] == 1e-3
    assert rates[1] < rates[0] and rates[4] < rates[3] < rates[2]


def test_an_instruction_survives_its_tensor() -> None:
    instruction = Instruction(
        Action.TRAIN, 2**40 + 1, 3, 17, 1.0 + 1 / 3, 0.7 + 0.1, 1e-4 / 3, True
    )
    assert Instruction.from_floats(instruction.to_floats()) == instruction


def test_the_digest_changes_with_everything_that_a_step_depends_on() -> None:
    instruction = Instruction(Action.TRAIN, 1, 0, 1, 1.5, 0.8, 1e-3, False)
    base = applied_digest(instruction, 1.5, 0.8, 1e-3, ["a", "b"])
    others = [
        applied_digest(instruction, 1.5000001, 0.8, 1e-3, ["a", "b"]),
        applied_digest(instruction, 1.5, 0.80001, 1e-3, ["a", "b"]),
        applied_digest(instruction, 1.5, 0.8, 1.001e-3, ["a", "b"]),
        applied_digest(instruction, 1.5, 0.8, 1e-3, ["b", "a"]),
        applied_digest(
            Instruction(Action.TRAIN, 2, 0, 1, 1.5, 0.8, 1e-3, False), 1.5, 0.8, 1e-3, ["a", "b"]
        ),
    ]
    assert base == applied_digest(instruction, 1.5, 0.8, 1e-3, ["a", "b"])
    assert base not in others and len(set(others)) == len(others)


def test_ranks_that_agree_add_their_token_counts(rank: object) -> None:
    instruction = Instruction(Action.TRAIN, 1, 0, 1, 1.5, 0.8, 1e-3, False)
    agreement = agree(123, 7, True, instruction, rank)  # type: ignore[arg-type]
    assert (agreement.num_label_tokens, agreement.is_stop_asked) == (7, True)
