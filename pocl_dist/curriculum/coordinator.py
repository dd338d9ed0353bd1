"""Rank 0 decides what happens next and broadcasts it; every rank does what it received.

One small tensor per action carries stage, temperature, KD ratio, learning rate and the optimizer
reset. What the ranks made of it they tell each other before each step: `agreement.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum

from pocl_dist.config import Config
from pocl_dist.curriculum.schedules import cosine_learning_rate, step_in_cosine
from pocl_dist.distributed.collectives import broadcast_floats
from pocl_dist.distributed.process_group import Rank
from pocl_dist.records import Stage


class Action(IntEnum):
    """What all ranks do next."""

    TRAIN = 0
    EVALUATE = 1
    SAVE = 2
    STOP = 3
    FINISH = 4
    QUARTERS = 5


@dataclass(frozen=True)
class Instruction:
    """One broadcast. `step` counts optimizer steps of the run, `step_in_stage` of the stage."""

    action: Action
    step: int
    stage: int
    step_in_stage: int
    temperature: float
    kd_ratio: float
    learning_rate: float
    resets_optimizer: bool

    def to_floats(self) -> list[float]:
        """Returns the fields as fp64; whole numbers stay exact."""
        return [float(value) for value in asdict(self).values()]

    @classmethod
    def from_floats(cls, values: Sequence[float]) -> Instruction:
        """Returns the instruction that `to_floats` took apart."""
        action, step, stage, step_in_stage, temperature, kd_ratio, learning_rate, resets = values
        return cls(
            Action(int(action)),
            int(step),
            int(stage),
            int(step_in_stage),
            temperature,
            kd_ratio,
            learning_rate,
            bool(resets),
        )


@dataclass
class Progress:
    """All that the next decision depends on; it is what a checkpoint keeps of the coordinator."""

    step: int = 0
    stage: int = 0
    step_in_stage: int = 0
    evaluated_at: int = -1
    quarters_at: int = -1
    saved_at: int = -1
    best_dev: float | None = None
    best_step: int = -1
    stage_best: float | None = None
    num_without_gain: int = 0
    is_converged: bool = False
    stage_ends: list[int] = field(default_factory=list)
    num_skipped: int = 0  # steps that were not taken: loss or gradient not finite
    num_skipped_in_row: int = 0
    num_overflows: int = 0  # of fp16; the loss scale was lowered instead
    num_rewinds: int = 0
    left_out_until: int = 0  # after a rewind: steps before this one are passed over


class Coordinator:
    """Holds the progress on every rank; only rank 0's decision counts."""

    def __init__(
        self,
        stages: Sequence[Stage],
        config: Config,
        rank: Rank,
        has_dev: bool,
        has_quarters: bool = False,
    ) -> None:
        self.stages = stages
        self.config = config
        self.rank = rank
        self.has_dev = has_dev
        self.has_quarters = has_quarters
        self.progress = Progress()

    def next_instruction(self, is_stop_asked: bool, is_save_asked: bool) -> Instruction:
        """Returns rank 0's decision. Collective."""
        mine = self._instruction(self._decide(is_stop_asked, is_save_asked))
        received = Instruction.from_floats(broadcast_floats(mine.to_floats(), self.rank))
        progress = self.progress
        if received.stage != progress.stage:
            self.progress = replace(
                progress, stage_best=None, num_without_gain=0, is_converged=False
            )
            self.progress.stage_ends = [*progress.stage_ends, progress.step]
        self.progress.stage, self.progress.step_in_stage = received.stage, received.step_in_stage
        self.progress.step = received.step
        return received

    def _decide(self, is_stop_asked: bool, is_save_asked: bool) -> Action:
        progress, every = self.progress, self.config.checkpoint.every
        is_saved = progress.saved_at == progress.step
        if is_stop_asked:
            return Action.STOP if is_saved else Action.SAVE
        is_stage_over = self._is_stage_over()
        dev_every = self.config.dev.every
        # Steps that are passed over, or were skipped, leave the weights as they were.
        is_new = not self.is_passing and progress.num_skipped_in_row == 0
        is_dev_due = (
            is_stage_over
            or progress.step == 0
            or (is_new and dev_every is not None and progress.step % dev_every == 0)
        )
        if self.has_dev and is_dev_due and progress.evaluated_at != progress.step:
            return Action.EVALUATE
        are_quarters_due = is_stage_over or progress.step == 0
        if self.has_quarters and are_quarters_due and progress.quarters_at != progress.step:
            return Action.QUARTERS
        is_best = self.config.export.select == "best_dev" and progress.best_step == progress.step
        is_save_due = is_stage_over or is_save_asked or is_best
        is_save_due = is_save_due or (
            is_new and every is not None and progress.step > 0 and progress.step % every == 0
        )
        if is_save_due and not is_saved:
            return Action.SAVE
        if is_stage_over and progress.stage == len(self.stages) - 1:
            return Action.FINISH
        return Action.TRAIN

    def _is_stage_over(self) -> bool:
        progress = self.progress
        return (
            progress.is_converged or progress.step_in_stage == self.stages[progress.stage].num_steps
        )

    def _instruction(self, action: Action) -> Instruction:
        progress = self.progress
        is_next_stage = action == Action.TRAIN and self._is_stage_over()
        stage = self.stages[progress.stage + 1 if is_next_stage else progress.stage]
        step_in_stage = 0 if is_next_stage else progress.step_in_stage
        optimizer = self.config.optimizer
        done_in_cosine, num_cosine_steps = step_in_cosine(
            step_in_stage, stage.num_steps, optimizer.restart_steps
        )
        is_restart = is_next_stage or (
            action == Action.TRAIN and step_in_stage in optimizer.restart_steps
        )
        return Instruction(
            action=action,
            step=progress.step,
            stage=stage.index,
            step_in_stage=step_in_stage,
            temperature=stage.temperature,
            kd_ratio=stage.kd_ratio,
            learning_rate=cosine_learning_rate(
                done_in_cosine,
                num_cosine_steps,
                optimizer.learning_rate,
                optimizer.min_learning_rate,
                optimizer.warmup_steps,
            ),
            resets_optimizer=is_restart and self.config.curriculum.optimizer == "reset",
        )

    @property
    def is_passing(self) -> bool:
        """Returns whether the present step is one that a rewind leaves out."""
        return self.progress.step < self.progress.left_out_until

    def record_step(self, *, is_skipped: bool = False, is_overflow: bool = False) -> None:
        """Counts an optimizer step: taken, skipped as not finite, or lost to an fp16 overflow."""
        progress = self.progress
        progress.step += 1
        progress.step_in_stage += 1
        progress.num_skipped += is_skipped
        progress.num_overflows += is_overflow
        if not is_overflow:
            progress.num_skipped_in_row = progress.num_skipped_in_row + 1 if is_skipped else 0

    def go_back(self, saved: Progress) -> None:
        """Takes up the progress of a checkpoint; the steps from there to the present one are out.

        What is counted over the whole run stays as it is now.
        """
        now = self.progress
        self.progress = replace(
            saved,
            num_skipped=now.num_skipped,
            num_skipped_in_row=0,
            num_overflows=now.num_overflows,
            num_rewinds=now.num_rewinds + 1,
            left_out_until=now.step,
        )

    def record_save(self) -> None:
        """Notes that the present step is saved; called before the progress is written."""
        self.progress.saved_at = self.progress.step

    def record_quarters(self) -> None:
        """Notes that the difficulty quarters were scored at the present step."""
        self.progress.quarters_at = self.progress.step

    def record_dev(self, value: float) -> None:
        """Takes in a dev metric (same on all ranks): best so far, convergence of the stage."""
        progress, curriculum = self.progress, self.config.curriculum
        progress.evaluated_at = progress.step
        sign = 1.0 if self.config.dev.is_higher_better else -1.0
        if progress.best_dev is None or sign * (value - progress.best_dev) > 0:
            progress.best_dev, progress.best_step = value, progress.step
        if progress.step_in_stage == 0:
            return  # belongs to the end of the stage before, or to the start
        if (
            progress.stage_best is None
            or sign * (value - progress.stage_best) > curriculum.min_delta
        ):
            progress.stage_best, progress.num_without_gain = value, 0
        else:
            progress.num_without_gain += 1
        if curriculum.advance == "converged" and progress.num_without_gain >= curriculum.patience:
            progress.is_converged = True
