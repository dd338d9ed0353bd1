"""Whose answers a step trains on: those of the data set, of the student, or of the replay buffer.

`on`: every step is on-policy; GKD (arXiv 2306.13649) with lambda = 1.

`mixed`: GKD, Algorithm 1. Each step draws one u ~ U(0, 1); u < lambda takes the student's answers
to the whole global batch, else the references.

`adaptive`: DistiLLM (arXiv 2402.03898) section 3.2, as its released code does it. With phi the
probability of the student's answers, step t of T and one u per step:
    u < phi * (1 - t/T), or u < phi while the buffer is not full: new answers, which it keeps;
    u < phi otherwise: a batch drawn from the buffer (off-policy);
    else the references.
phi starts at `initial_ratio`. A dev loss that is `loss_tolerance` or more above the lowest since
the last raise raises it by `ratio_increment`, to 1 at most. (The released code compares with the
loss at the last raise, at first with that before training: one that falls and then rises would have
to climb all the way back before it counts.) T counts the steps of all stages; neither phi nor the
buffer starts anew at a stage.

u is a function of (seed, step), not of the rank; rank 0 decides and all take what they receive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum

import numpy as np
import torch

from pocl_dist.config import Config, PolicyConfig
from pocl_dist.distributed.collectives import broadcast_floats
from pocl_dist.distributed.process_group import Rank
from pocl_dist.files import JSONValue
from pocl_dist.on_policy.replay_buffer import KIND, ReplayBuffer
from pocl_dist.records import EncodedExample

_CHOICE, _REPLAY = 1, 2  # streams of the step's generator: no two uses draw the same numbers


class AnswerSource(IntEnum):
    """Where the answers of a step come from."""

    DATA = 0
    STUDENT = 1
    REPLAY = 2


@dataclass
class PolicyState:
    """All that the next decision depends on besides the step; a checkpoint keeps it."""

    ratio: float  # phi of `adaptive`
    dev_loss: float | None = None  # the lowest since the last raise, or that of the raise
    num_student_steps: int = 0
    num_replay_steps: int = 0
    num_answers: int = 0  # that the student gave
    num_answer_tokens: int = 0


def step_generator(seed: int, step: int, stream: int) -> np.random.Generator:
    """Returns the generator of one use of randomness in one step: the same on every rank."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, step, stream])))


def choose_source(
    policy: PolicyConfig, ratio: float, draw: float, progress: float, is_buffer_full: bool
) -> AnswerSource:
    """Returns the source of a step for `draw` ~ U(0, 1), `ratio` phi and `progress` t/T.

    The module's docstring gives the rule of each mode.
    """
    if policy.mode == "on":
        return AnswerSource.STUDENT
    if policy.mode == "mixed":
        is_student = draw < policy.on_policy_ratio
        return AnswerSource.STUDENT if is_student else AnswerSource.DATA
    if draw >= ratio:
        return AnswerSource.DATA
    is_new = draw < ratio * (1.0 - progress) or not is_buffer_full
    return AnswerSource.STUDENT if is_new else AnswerSource.REPLAY


class OnPolicy:
    """Decides the source of each step and keeps what that depends on; the same on every rank."""

    def __init__(self, config: Config, num_steps: int, rank: Rank) -> None:
        assert config.policy.mode != "off", "without a policy there is nothing to decide"
        self.config = config
        self.num_steps = num_steps
        self.rank = rank
        self.buffer = ReplayBuffer(config.policy.replay_buffer_size)
        self.state = PolicyState(config.policy.initial_ratio)

    def next_source(self, step: int) -> AnswerSource:
        """Returns rank 0's choice for a step. Collective."""
        draw = step_generator(self.config.seed, step, _CHOICE).random()
        progress = step / self.num_steps
        mine = choose_source(
            self.config.policy, self.state.ratio, draw, progress, self.buffer.is_full
        )
        return AnswerSource(int(broadcast_floats([mine], self.rank)[0]))

    def replay_generator(self, step: int) -> np.random.Generator:
        """Returns what draws a step's batch from the buffer."""
        return step_generator(self.config.seed, step, _REPLAY)

    def record_answers(self, answers: Sequence[EncodedExample]) -> None:
        """Counts a step's new answers; `adaptive` keeps them for later steps."""
        self.state.num_student_steps += 1
        self.state.num_answers += len(answers)
        self.state.num_answer_tokens += sum(answer.num_response_tokens for answer in answers)
        if self.is_adaptive:
            self.buffer.add(answers)

    def record_replay(self) -> None:
        """Counts a step on answers of the buffer."""
        self.state.num_replay_steps += 1

    def record_dev_loss(self, value: float) -> None:
        """Takes in a dev loss (same on all ranks); phi may rise."""
        policy, state = self.config.policy, self.state
        if state.dev_loss is None or value < state.dev_loss:
            state.dev_loss = value
        elif value >= state.dev_loss + policy.loss_tolerance:
            state.ratio = min(1.0, state.ratio + policy.ratio_increment)
            state.dev_loss = value

    @property
    def is_adaptive(self) -> bool:
        """Returns whether the dev loss is followed and the student's answers are kept."""
        return self.config.policy.mode == "adaptive"

    def to_json(self) -> dict[str, JSONValue]:
        """Returns the state without the buffer, which is tensors."""
        return asdict(self.state)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Returns the replay buffer as named CPU tensors."""
        return {f"{KIND}.{name}": tensor for name, tensor in self.buffer.to_tensors().items()}

    def restore(
        self,
        state: Mapping[str, JSONValue],
        tensors: Mapping[str, torch.Tensor],
        encoded: Mapping[str, EncodedExample],
    ) -> None:
        """Sets what `to_json` and the buffer's `to_tensors` gave; `encoded` are the data set's."""
        self.state = PolicyState(**state)  # type: ignore[arg-type]
        self.buffer.restore(tensors, encoded)
