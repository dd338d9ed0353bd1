"""Forgetting, as it shows: ROUGE-L, cross-entropy and KL by difficulty quarter, at stage ends.

The ranking is cut into four quarters, whatever the stages are. Of each, a sample of training rows
is answered and scored before training and at every stage end: always the same rows, so a quarter
that gets worse was forgotten.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from pocl_dist.data.encoding import collate, pad_id_of
from pocl_dist.pipeline.dev import Row, batches_of, rouge_sum, sums_by_group
from pocl_dist.pipeline.student import batch_arguments, plain_copy
from pocl_dist.pipeline.training import Training
from pocl_dist.records import TeacherOutput

Groups = list[list[Sequence[Row]]]


def evaluate_quarters(
    training: Training, is_stop_asked: Callable[[], bool], on_batch: Callable[[], None]
) -> None:
    """Scores every quarter and logs it as one line. Collective.

    A stop that is asked for meanwhile drops it: the resumed run evaluates anew.
    """
    started = time.monotonic()
    answers = _answer_sums(training, is_stop_asked, on_batch)
    losses = None if answers is None else _loss_sums(training, is_stop_asked, on_batch)
    if answers is None or losses is None:
        training.is_stop_asked = True
        return
    training.coordinator.record_quarters()
    progress = training.coordinator.progress
    rouge = [_mean(total, count) for total, count in answers]
    has_teacher = training.teacher is not None
    training.record(
        {
            "kind": "quarters",
            "step": progress.step,
            "stage": progress.stage,
            "num_rows": [int(count) for _, count in answers],
            "rouge_l": rouge,
            "cross_entropy": [_mean(ce, count) for ce, _, count in losses],
            "kl": [_mean(kl, count) if has_teacher else None for _, kl, count in losses],
            "seconds": time.monotonic() - started,
        }
    )
    if training.rank.is_main:
        shown = ", ".join("-" if value is None else f"{value:.2f}" for value in rouge)
        training.display.note(f"step {progress.step}: rouge_l by quarter, easy to hard: {shown}")


def _mean(total: float, count: float) -> float | None:
    """Returns the mean; None of nothing."""
    return total / count if count else None


def _answer_sums(
    training: Training, is_stop_asked: Callable[[], bool], on_batch: Callable[[], None]
) -> list[list[float]] | None:
    """Returns (sum of ROUGE-L in %, rows) per quarter, as the dev metric has it. Collective."""
    settings, model = training.config.generation, plain_copy(training.engine)
    groups = [batches_of(rows, settings.batch_size) for rows in training.quarters]

    def score(batch: Sequence[Row]) -> Sequence[float]:
        return rouge_sum(model, training.tokenizer, batch, settings.max_new_tokens)

    return sums_by_group(groups, 2, score, training.rank, is_stop_asked, on_batch)


def _loss_sums(
    training: Training, is_stop_asked: Callable[[], bool], on_batch: Callable[[], None]
) -> list[list[float]] | None:
    """Returns (cross-entropy, KL(teacher | student), tokens), summed per quarter. Collective.

    Both at temperature 1 and over all response tokens, eos included, by the forward of the train
    step: heads, adapters and teachers of every kind are treated as there.
    """
    module, engine, teacher = training.module, training.engine, training.teacher
    size = training.config.engine.micro_batch_size
    groups = [batches_of(rows, size) for rows in training.quarters]
    pad_id, loss = pad_id_of(training.tokenizer), module.loss

    def score(rows: Sequence[Row]) -> Sequence[float]:
        batch = collate([encoded for _, encoded in rows], pad_id).to(training.rank.device)
        answer = nullcontext(TeacherOutput()) if teacher is None else teacher.answer(batch)
        with torch.no_grad(), answer as output:
            _, part_sums = engine(*batch_arguments(batch), output, batch.position_ids_BT)
        _, ce_loss_sum, kl_sum = part_sums.tolist()
        return ce_loss_sum, kl_sum, float(batch.num_label_tokens)

    engine.eval()
    # The train step sets both for each step; without gradients it would be compiled once more.
    module.temperature, module.kd_ratio = 1.0, 0.0 if teacher is None else 1.0
    module.loss = loss.model_copy(update={"compile": "never"})
    try:
        return sums_by_group(groups, 3, score, training.rank, is_stop_asked, on_batch)
    finally:
        module.loss = loss
