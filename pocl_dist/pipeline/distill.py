"""distill: the training step, all ranks the same lines. Started by a launcher (launch/local.sh)."""

from __future__ import annotations

import sys
import time
import uuid
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial

import torch

from pocl_dist.config import Config
from pocl_dist.curriculum.agreement import agree, applied_digest
from pocl_dist.curriculum.coordinator import Action, Instruction
from pocl_dist.distributed.collectives import gather_texts, on_any_rank
from pocl_dist.distributed.engine import (
    learning_rate_of,
    reset_optimizer,
    set_learning_rate,
)
from pocl_dist.distributed.process_group import (
    Rank,
    join_process_group,
    lost_peers_named,
)
from pocl_dist.distributed.watchdog import EXIT_CODE, Watchdog
from pocl_dist.errors import ConfigError, StoppedError
from pocl_dist.failpoints import failpoint
from pocl_dist.pipeline.agreement import agree_on_setup
from pocl_dist.pipeline.dev import evaluate_on_dev
from pocl_dist.pipeline.nonfinite import skip_step
from pocl_dist.pipeline.prepare import prepare_training
from pocl_dist.pipeline.quarters import evaluate_quarters
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.pipeline.run_lock import abandonment
from pocl_dist.pipeline.save import export, finish_save, is_save_wanted, save
from pocl_dist.pipeline.step_answers import answered_batch, choose_answers
from pocl_dist.pipeline.step_batches import micro_batches, sampler_of
from pocl_dist.pipeline.stop_request import StopRequest
from pocl_dist.pipeline.train_step import NotFinite, StepResult, train_step
from pocl_dist.pipeline.training import Training
from pocl_dist.records import Stage
from pocl_dist.trackers.registry import wanted_trackers


def distill_rank(config: Config, run: RunDirectory) -> None:
    """Trains the student as planned and exports it. Collective: the launcher starts every rank.

    1. join the group, compare inputs over the ranks, load or resume;
    2. repeat what rank 0 says next: train, evaluate, save; until it says finish (or stop: exit code
       75);
    3. export the selected weights.
    """
    stop = StopRequest(run, config.run.max_wallclock_minutes)
    stop.install()
    # The watchdog is to speak first: it knows names. The group's own limit is the second net.
    timeout = config.engine.timeout_seconds
    rank = join_process_group(timeout * 1.5 + 30)
    watchdog = _watchdog(run, rank, timeout)
    watchdog.start()
    try:
        with lost_peers_named(rank, watchdog.missing):
            _distill(config, run, rank, stop, watchdog)
    finally:
        watchdog.close()


def _watchdog(run: RunDirectory, rank: Rank, timeout_seconds: float) -> Watchdog:
    """Returns this rank's watchdog, not yet started. Collective."""

    def on_hang(reason: str) -> None:
        print(f"WATCHDOG: {reason}", file=sys.stderr, flush=True)
        run.write_status("failed", EXIT_CODE, "distill", reason)

    job = gather_texts(uuid.uuid4().hex, rank)[0]
    folder = run.root / "control" / "ranks"
    # Rank 0 alone asks: the others end when they lose it.
    abandoned = partial(abandonment, run.root) if rank.is_main else (lambda: "")
    return Watchdog(folder, job, rank.index, rank.world_size, timeout_seconds, on_hang, abandoned)


def _distill(
    config: Config, run: RunDirectory, rank: Rank, stop: StopRequest, watchdog: Watchdog
) -> None:
    if config.engine.world_size not in (None, rank.world_size):
        raise ConfigError(
            f"engine.world_size: {config.engine.world_size}, "
            f"but the launcher started {rank.world_size} ranks"
        )
    wanted_trackers(config.log)  # refused before anything is loaded
    watchdog.beat("loading", is_bounded=False)
    agree_on_setup(config, rank)
    failpoint("loading")
    training = prepare_training(config, run, rank)
    training.is_stop_asked = on_any_rank(stop.is_asked(), rank)
    # On rank 0 only: two live displays would draw over each other.
    with training.display.live() if rank.is_main else nullcontext():
        while True:
            is_save_asked = rank.is_main and is_save_wanted(training)
            is_stop_asked = stop.is_asked() or training.is_stop_asked
            watchdog.beat("next instruction", training.coordinator.progress.step)
            instruction = training.coordinator.next_instruction(is_stop_asked, is_save_asked)
            watchdog.beat(instruction.action.name.lower())
            if instruction.action == Action.TRAIN:
                _train(training, instruction, stop)
            elif instruction.action == Action.EVALUATE:
                evaluate_on_dev(training, stop.is_asked, lambda: watchdog.beat("evaluate"))
            elif instruction.action == Action.QUARTERS:
                evaluate_quarters(training, stop.is_asked, lambda: watchdog.beat("quarters"))
            elif instruction.action == Action.SAVE:
                save(training)
                training.tell_status()
            elif instruction.action == Action.STOP:
                finish_save(training)
                training.close()
                raise StoppedError(
                    f"stopped at step {instruction.step}, saved; "
                    "the same command goes on from there"
                )
            else:
                break
    watchdog.beat("export", is_bounded=False)
    failpoint("export.before")
    if on_any_rank(stop.is_asked(), rank):
        finish_save(training)
        training.close()
        raise StoppedError("trained to the end and saved; the same command exports the result")
    export(training)
    training.close()


def _train(training: Training, instruction: Instruction, stop: StopRequest) -> None:
    """Applies the instruction, checks that all ranks did, takes the step, logs it. Collective.

    A step that a rewind leaves out is only counted; one whose loss or gradient is not finite is
    skipped. Nothing is done when a stop is asked for while the student answers.
    """
    started = time.monotonic()
    config, rank, engine = training.config, training.rank, training.engine
    is_first = instruction.step_in_stage == 0
    if is_first:
        failpoint("stage.before")
        stage = training.plan.stages[instruction.stage]
        training.record(
            {"kind": "stage", "step": instruction.step + 1, "stage": stage.index, **_numbers(stage)}
        )
    if instruction.resets_optimizer:
        reset_optimizer(engine)
    if training.coordinator.is_passing:
        training.coordinator.record_step()
        return
    source, instruction = choose_answers(training, instruction)
    set_learning_rate(engine, instruction.learning_rate)
    training.module.temperature = instruction.temperature
    training.module.kd_ratio = instruction.kd_ratio
    engine.train()

    answered = answered_batch(training, instruction, source, stop.is_asked)
    if answered is None:
        training.is_stop_asked = True
        return
    batches = micro_batches(training, answered.examples)
    digest = applied_digest(
        instruction,
        training.module.temperature,
        training.module.kd_ratio,
        learning_rate_of(engine),
        answered.applied_rows(),
    )
    num_label_tokens = sum(batch.num_label_tokens for batch in batches)
    agreement = agree(digest, num_label_tokens, stop.was_signalled, instruction, rank)
    training.is_stop_asked |= agreement.is_stop_asked
    # Dropout masks: a function of step and rank, so that a resumed run draws the same ones.
    torch.manual_seed(config.seed * 1_000_003 + instruction.step * 1009 + rank.index)
    teacher = training.teacher if instruction.kd_ratio > 0 else None
    failpoint("train.before_step")
    result = train_step(engine, teacher, batches, agreement.num_label_tokens, instruction, rank)
    failpoint("train.after_step")
    if is_first:
        failpoint("stage.after")
    if isinstance(result, NotFinite):
        skip_step(training, instruction, answered.examples, batches, result)
        return
    training.coordinator.record_step(is_overflow=result.is_overflow)
    answers = {} if training.policy is None else answered.metrics()
    _log_step(training, instruction, result, answers, time.monotonic() - started)


def _numbers(stage: Stage) -> dict[str, object]:
    return {key: value for key, value in stage.to_json().items() if key != "index"}


def _log_step(
    training: Training,
    instruction: Instruction,
    result: StepResult,
    answers: dict[str, object],
    seconds: float,
) -> None:
    values = asdict(result)
    num_input_tokens, is_overflow = values.pop("num_input_tokens"), values.pop("is_overflow")
    row: dict[str, object] = {
        "kind": "step",
        "step": instruction.step + 1,
        "stage": instruction.stage,
        "epoch": sampler_of(training, instruction.stage).epoch_of(instruction.step_in_stage),
        "temperature": instruction.temperature,
        "kd_ratio": instruction.kd_ratio,
        "learning_rate": instruction.learning_rate,
        "tokens_per_second": num_input_tokens / seconds,
        **values,
        **answers,
    }
    if is_overflow:
        row["overflow"] = True
    training.record(row)
    if training.rank.is_main:
        training.display.step(row, instruction.step_in_stage + 1, seconds)
