"""Whose answers a step trains on, as examples: the references, the student's, or replayed ones.

Nothing after this notices: the student's answers are EncodedExamples like any other, so labels are
shifted, batches balanced and the loss computed by the same functions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from pocl_dist.curriculum.coordinator import Instruction
from pocl_dist.on_policy.policy import AnswerSource
from pocl_dist.on_policy.rollout import answer_all
from pocl_dist.pipeline.step_batches import global_batch
from pocl_dist.pipeline.student import plain_copy
from pocl_dist.pipeline.training import Training
from pocl_dist.records import EncodedExample


@dataclass(frozen=True)
class AnsweredBatch:
    """The examples of a global step, the same on every rank, and where their answers come from."""

    examples: list[EncodedExample]
    source: AnswerSource
    generation_seconds: float  # of this rank, the wait for the others included

    def applied_rows(self) -> list[str]:
        """Returns what tells these rows from others, for the digest that the ranks compare."""
        if self.source == AnswerSource.DATA:
            return [example.example_id for example in self.examples]
        return [f"{example.example_id} {example.token_ids}" for example in self.examples]

    def metrics(self) -> dict[str, object]:
        """Returns what a step's line of `metrics.jsonl` tells of the answers."""
        num_tokens = math.fsum(example.num_response_tokens for example in self.examples)
        return {
            "on_policy_share": float(self.source != AnswerSource.DATA),
            "replay_share": float(self.source == AnswerSource.REPLAY),
            "mean_answer_tokens": num_tokens / len(self.examples),
            "generation_seconds": self.generation_seconds,
        }


def choose_answers(
    training: Training, instruction: Instruction
) -> tuple[AnswerSource, Instruction]:
    """Returns the source of the step's answers, and the instruction as it is applied. Collective.

    On the student's own answers the KD ratio is 1: cross-entropy there would teach the student what
    it says already (docs/decisions/on-policy.md).
    """
    if training.policy is None:
        return AnswerSource.DATA, instruction
    source = training.policy.next_source(instruction.step)
    is_data = source == AnswerSource.DATA
    return source, instruction if is_data else replace(instruction, kd_ratio=1.0)


def answered_batch(
    training: Training,
    instruction: Instruction,
    source: AnswerSource,
    is_stop_asked: Callable[[], bool],
) -> AnsweredBatch | None:
    """Returns the examples of the step with the answers of `source`. Collective if the student's.

    The student's weights are gathered once, into a copy that is gone before the step's forward.
    None, on every rank, when one of them was asked to stop while the student answered.
    """
    examples, policy = global_batch(training, instruction), training.policy
    if policy is None or source == AnswerSource.DATA:
        return AnsweredBatch(examples, AnswerSource.DATA, 0.0)
    if source == AnswerSource.REPLAY:
        drawn = policy.buffer.sample(len(examples), policy.replay_generator(instruction.step))
        policy.record_replay()
        return AnsweredBatch(drawn, source, 0.0)
    started = time.monotonic()
    answers = answer_all(
        plain_copy(training.engine),
        training.tokenizer,
        examples,
        training.config,
        instruction.step,
        training.rank,
        is_stop_asked,
    )
    if answers is None:
        return None
    policy.record_answers(answers)
    return AnsweredBatch(answers, source, time.monotonic() - started)
