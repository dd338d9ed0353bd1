"""Config sections of the train loop: loss, optimizer, teacher, policy, engine, what is saved."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from pocl_dist.config.section import Section, Text


class LossConfig(Section):
    """The divergence between teacher and student."""

    name: Text = "forward_kl"
    """One of the divergences of `pocl_dist.losses`."""
    kwargs: dict[str, float] = {}
    """Its parameters, e.g. `skew: 0.1`."""
    temperature_scaling: Literal["auto", "squared", "linear", "none", "published"] = "auto"
    """Factor on the divergence at temperature T: its own order, T^2, T, 1, or as published."""
    chunk_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens whose logits exist at once; null: from a memory budget."""


class OptimizerConfig(Section):
    """AdamW with a cosine that restarts at every stage."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak of the cosine."""
    min_learning_rate: Annotated[float, Field(ge=0)] = 1e-7
    """End of the cosine."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Linear warm-up at the start of every stage."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """On matrices only; biases and norms are left out."""
    betas: Annotated[
        list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)
    ] = [0.9, 0.999]
    """Decay of the first and second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    grad_clip: Annotated[float, Field(ge=0)] = 1.0
    """Bound of the global gradient norm; 0: none."""


class TeacherConfig(Section):
    """How the teacher is run."""

    source: Literal["online"] = "online"
    """The teacher runs beside the student, in a ZeRO-3 engine of its own."""
    offload_param: Literal["none", "cpu"] = "none"
    """Where its partitioned weights lie between uses."""


class PolicyConfig(Section):
    """Whose answers are trained on."""

    mode: Literal["off"] = "off"
    """`off`: the references of the data set."""


class EngineConfig(Section):
    """DeepSpeed."""

    zero_stage: Literal[0, 1, 2, 3] = 3
    """ZeRO stage of the student; the teacher is always partitioned (stage 3)."""
    world_size: Annotated[int, Field(ge=1)] | None = None
    """Ranks; null takes the launcher's (alone: one per GPU, or 1)."""
    micro_batch_size: Annotated[int, Field(ge=1)] = 8
    """Upper bound of rows per rank and forward pass."""
    global_batch_size: Annotated[int, Field(ge=1)] = 64
    """Rows per optimizer step over all ranks; a whole multiple of the ranks."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Null: bf16 on GPU, fp32 on CPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more time."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where AdamW's state lies (ZeRO stage 1 and up)."""
    offload_param: Literal["none", "cpu"] = "none"
    """Where the student's partitioned weights lie (ZeRO stage 3)."""
    zero_options: dict[str, JsonValue] = {}
    """More keys for DeepSpeed's `zero_optimization` section, e.g. bucket sizes."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """A collective that takes longer ends the run with exit code 71."""


class RunConfig(Section):
    """How long this attempt of the run may take."""

    max_wallclock_minutes: Annotated[float, Field(gt=0)] | None = None
    """After this long the run saves and exits with code 75; leave room for a step and a save."""
    max_restarts: Annotated[int, Field(ge=0)] = 0
    """How often `run` and `distill` start the ranks again after one was lost (exit code 71)."""


class ResumeConfig(Section):
    """What happens when a run is continued."""

    on_damage: Literal["fallback", "fail"] = "fallback"
    """A checkpoint that does not verify: use the one before, or stop with exit code 78."""


class CheckpointConfig(Section):
    """What is saved on the way."""

    every: Annotated[int, Field(ge=1)] | None = None
    """Steps between checkpoints, besides those at stage ends and stops; null: stage ends only."""
    every_minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes between checkpoints, besides `every`; null: no limit in time."""
    keep_last: Annotated[int, Field(ge=1)] = 2
    """Older checkpoints are removed."""
    keep_stage_ends: bool = False
    """Also keep the last checkpoint of every stage."""


class ExportConfig(Section):
    """The result."""

    select: Literal["last", "best_dev"] = "last"
    """The weights after the last step, or those with the best dev metric."""


class LogConfig(Section):
    """What is shown and recorded besides `metrics.jsonl`."""

    tensorboard: bool | None = None
    """Null: if the package is installed."""
    every: Annotated[int, Field(ge=1)] = 10
    """Steps between printed lines when the output is no terminal."""
