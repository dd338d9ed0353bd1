"""Back to a checkpoint after too many steps that were not finite; the steps since then are left
out this time.

What is left out is not the bad batches alone: taking the same steps again would lead to the same
weights, on which these batches were not finite. The checkpoint's progress with one number more
(`left_out_until`) is all there is to it, so a run that is killed and resumed decides so again.
"""

from __future__ import annotations

from typing import cast

from pocl_dist.distributed.checkpoint import WEIGHTS, find_checkpoint, restore_optimizer
from pocl_dist.distributed.collectives import broadcast_floats
from pocl_dist.distributed.parameters import set_weight
from pocl_dist.files import JSONValue
from pocl_dist.on_policy.replay_buffer import KIND as REPLAY
from pocl_dist.on_policy.replay_buffer import stored_ids
from pocl_dist.pipeline.prepare import progress_of
from pocl_dist.pipeline.save import finish_save
from pocl_dist.pipeline.training import Training


def step_to_go_back_to(training: Training) -> int | None:
    """Returns the step of the checkpoint to go back to, None when there is to be none. Collective.

    It is the newest from before the last step that changed a weight: one written since then holds
    the weights as they are.
    """
    finish_save(training)  # one under way may be the newest
    settings, progress = training.config.nonfinite, training.coordinator.progress
    found = -1
    if settings.rewind and progress.num_rewinds < settings.max_rewinds:
        num_taken = progress.step - progress.num_skipped_in_row
        earlier = (step for step in training.run.checkpoint_steps() if step < num_taken)
        found = max(earlier, default=-1)
    step = int(broadcast_floats([found], training.rank)[0])
    return None if step < 0 else step


def go_back(training: Training, step: int) -> None:
    """Sets weights, optimizer, policy and progress as the checkpoint has them. Collective."""
    folder, rank = training.run.checkpoints, training.rank
    checkpoint = find_checkpoint(folder, rank, training.run_digest, "fail", only_step=step)
    assert checkpoint is not None, "rank 0 saw it"
    coordinator, engine = training.coordinator, training.engine
    left_at = coordinator.progress.step
    parameters = dict(engine.module.named_parameters())
    for name, value in checkpoint.tensors(WEIGHTS):
        set_weight(parameters[name], value)
    restore_optimizer(engine, checkpoint)
    if training.policy is not None:
        state = cast("dict[str, JSONValue]", checkpoint.state["policy"])
        tensors = dict(checkpoint.tensors(REPLAY))
        training.policy.restore(state, tensors, training.examples.of_ids(stored_ids(tensors)))
    coordinator.go_back(progress_of(checkpoint))
    training.record(
        {
            "kind": "rewind",
            "step": left_at,
            "stage": coordinator.progress.stage,
            "checkpoint": step,
            "num_rewinds": coordinator.progress.num_rewinds,
        }
    )
    if training.rank.is_main:
        training.display.note(
            f"back to the checkpoint of step {step}; steps {step + 1} to {left_at} are left out"
        )
