"""The coordinator against forty lines that say what it must do, under stops and crashes (T20).

The reference writes the whole course of an undisturbed run down with nested loops. hypothesis then
walks the real coordinator, asks for saves and stops, lets it crash back to what was saved last, and
compares each instruction with the course.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from pocl_dist.config import Config, load_config
from pocl_dist.curriculum.coordinator import Action, Coordinator, Instruction, Progress
from pocl_dist.distributed.process_group import Rank
from pocl_dist.records import Stage
from tests.chaos.lab import Lab
from tests.chaos.result import Result

NUM_SEQUENCES = 400
LONGEST = 60


# --------------------------------------------------------------------------------- the reference


def ideal_course(stages: list[Stage], config: Config, dev: list[float] | None) -> list[tuple]:
    """Returns every TRAIN and EVALUATE of an undisturbed run, in order; `dev` by step."""
    course: list[tuple] = []
    every, curriculum, optimizer = config.dev.every, config.curriculum, config.optimizer
    step = 0
    if dev is not None:
        course.append(("EVALUATE", 0, 0))
    for stage in stages:
        best, num_without_gain = math.inf, 0
        for k in range(stage.num_steps):
            gap = optimizer.learning_rate - optimizer.min_learning_rate
            rate = (
                optimizer.min_learning_rate
                + gap * (1 + math.cos(math.pi * k / stage.num_steps)) / 2
            )
            resets = k == 0 and stage.index > 0 and curriculum.optimizer == "reset"
            values = (stage.index, k, stage.temperature, stage.kd_ratio, round(rate, 12), resets)
            course.append(("TRAIN", step, *values))
            step += 1
            is_last = k + 1 == stage.num_steps
            if dev is None or not (is_last or (every is not None and step % every == 0)):
                continue
            course.append(("EVALUATE", step, stage.index))
            if dev[step] < best - curriculum.min_delta:
                best, num_without_gain = dev[step], 0
            else:
                num_without_gain += 1
            if curriculum.advance == "converged" and num_without_gain >= curriculum.patience:
                break
    course.append(("FINISH", step, stages[-1].index))
    return course


def stage_ends(course: list[tuple]) -> set[int]:
    """Returns the steps at which a stage was over: there a checkpoint is due."""
    trained = [row for row in course if row[0] == "TRAIN"]
    after = [*trained[1:], ("", 0, -1)]
    return {row[1] + 1 for row, n in zip(trained, after, strict=True) if row[2] != n[2]}


def seen_as(instruction: Instruction) -> tuple:
    """Returns an instruction as a row of the course."""
    if instruction.action != Action.TRAIN:
        return (instruction.action.name, instruction.step, instruction.stage)
    fields = asdict(instruction)
    names = (
        "stage",
        "step_in_stage",
        "temperature",
        "kd_ratio",
        "learning_rate",
        "resets_optimizer",
    )
    values = [fields[name] for name in names]
    values[4] = round(values[4], 12)
    return ("TRAIN", instruction.step, *values)


# ------------------------------------------------------------------------------------ the machine


class CoordinatorMachine(RuleBasedStateMachine):
    """Walks one coordinator; `config_file` and `rank` are set on the class before it runs."""

    config_file = Path()
    rank: Rank
    num_checked = 0

    @initialize(
        lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
        save_every=st.none() | st.integers(1, 3),
        dev_every=st.none() | st.integers(1, 3),
        has_dev=st.booleans(),
        advance=st.sampled_from(["fixed", "converged"]),
        optimizer=st.sampled_from(["reset", "keep"]),
        dev=st.lists(st.integers(0, 4).map(float), min_size=16, max_size=16),
    )
    def begin(
        self, lengths: list[int], save_every: int | None, dev_every: int | None, has_dev: bool,
        advance: str, optimizer: str, dev: list[float],
    ) -> None:  # fmt: skip
        """Draws a run; the dev metric is a function of the step, as of weights."""
        if advance == "converged":
            has_dev, dev_every = True, dev_every or 2
        words = [
            f"checkpoint.every={save_every if save_every else 'null'}",
            f"dev.every={dev_every if dev_every else 'null'}",
            "dev.metric=loss", "curriculum.patience=2", f"curriculum.num_stages={len(lengths)}",
            f"curriculum.advance={advance}", f"curriculum.optimizer={optimizer}",
            "data.dev=dev.jsonl",
        ]  # fmt: skip
        self.config = load_config([self.config_file], words)
        self.stages = [
            Stage(i, 8 * (i + 1), 1.0 + i, 0.7 + i / 10, 1.0, n) for i, n in enumerate(lengths)
        ]
        self.dev = dev if has_dev else None
        self.course = ideal_course(self.stages, self.config, self.dev)
        self.save_at = stage_ends(self.course)
        self.saved = json.dumps(asdict(Progress()))
        self.saved_steps = {0}
        self.is_finished = False
        self.start()

    def start(self) -> None:
        """Begins an attempt with what was saved last, after a way through JSON."""
        self.coordinator = Coordinator(self.stages, self.config, self.rank, self.dev is not None)
        self.coordinator.progress = Progress(**json.loads(self.saved))
        step, saved = self.coordinator.progress.step, json.loads(self.saved)
        is_evaluated = saved["evaluated_at"] == step
        self.position = next(
            at
            for at, row in enumerate(self.course)
            if row[1] == step and not (row[0] == "EVALUATE" and is_evaluated)
        )

    def follow(self, is_stop_asked: bool, is_save_asked: bool) -> Action:
        """Asks for one instruction, compares it and does it."""
        instruction = self.coordinator.next_instruction(is_stop_asked, is_save_asked)
        action = instruction.action
        progress = self.coordinator.progress
        if action == Action.SAVE:
            due = is_stop_asked or is_save_asked or progress.step in self.save_at
            every = self.config.checkpoint.every
            due = due or (every is not None and progress.step > 0 and progress.step % every == 0)
            assert due, f"a save at step {progress.step} that nothing asks for"
            self.coordinator.record_save()
            self.saved = json.dumps(asdict(self.coordinator.progress))
            self.saved_steps.add(progress.step)
        elif action == Action.STOP:
            assert is_stop_asked and json.loads(self.saved)["step"] == instruction.step
        else:
            assert not is_stop_asked, f"{action.name} although a stop was asked for"
            expected = self.course[self.position]
            assert seen_as(instruction) == expected, f"{seen_as(instruction)}, expected {expected}"
            self.position += 1
            type(self).num_checked += 1
        if action in (Action.TRAIN, Action.FINISH) and instruction.step in self.save_at:
            assert instruction.step in self.saved_steps, "a stage ended without a checkpoint"
        if action == Action.TRAIN:
            self.coordinator.record_step()
        elif action == Action.EVALUATE:
            assert self.dev is not None
            self.coordinator.record_dev(self.dev[instruction.step])
        self.is_finished |= action == Action.FINISH
        return action

    @precondition(lambda self: not self.is_finished)
    @rule(is_save_asked=st.booleans())
    def go_on(self, is_save_asked: bool) -> None:
        """The train loop, undisturbed; at times somebody asks for a save."""
        self.follow(False, is_save_asked)

    @precondition(lambda self: not self.is_finished)
    @rule()
    def stop_and_resume(self) -> None:
        """A stop: saved at this very step, and nothing else happens before it."""
        step = self.coordinator.progress.step
        actions = [self.follow(True, False)]
        while actions[-1] != Action.STOP:
            actions.append(self.follow(True, False))
            assert len(actions) <= 2
        assert json.loads(self.saved)["step"] == step
        self.start()

    @rule()
    def crash_and_resume(self) -> None:
        """A kill, also at the very end: all since the last save is done again, the same."""
        self.is_finished = False
        self.start()

    def teardown(self) -> None:
        """Lets it come to its end: the whole course, nothing left out."""
        if hasattr(self, "course"):
            while not self.is_finished:
                self.follow(False, False)
            assert self.position == len(self.course)


@contextmanager
def single_rank() -> Iterator[Rank]:
    """Makes this process the only rank of a real gloo group while the context lasts."""
    import torch.distributed as dist

    from pocl_dist.distributed.process_group import join_process_group

    before = dict(os.environ)
    try:
        yield join_process_group(30)
    finally:
        dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


def check(config_file: Path, num_sequences: int, number: int) -> int:
    """Walks `num_sequences` runs; returns the instructions compared; raises when one differs."""
    from hypothesis.stateful import run_state_machine_as_test

    with single_rank() as rank:
        machine = type("Machine", (CoordinatorMachine,), {"config_file": config_file, "rank": rank})
        wanted = settings(
            max_examples=num_sequences, stateful_step_count=LONGEST, deadline=None, database=None,
            suppress_health_check=list(HealthCheck), print_blob=False,
        )  # fmt: skip
        run_state_machine_as_test(seed(number)(machine), settings=wanted)
        return int(machine.num_checked)  # type: ignore[attr-defined]


def run(lab: Lab, num_sequences: int = NUM_SEQUENCES) -> Result:
    """Counts sequences; one that leaves the course fails the experiment with its steps."""
    result = lab.result("stops, saves and crashes between any two decisions of the coordinator")
    config, num = lab.training_config(lab.place("coordinator")), lab.count(num_sequences)
    num_checked = check(config, num, lab.seed)
    result.num_faults = result.num_survived = num
    result.notes.append(f"{num} sequences, {num_checked} instructions equal to the reference")
    return result
