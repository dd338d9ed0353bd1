"""Config sections of the train loop: loss, optimizer, teacher, policy, engine, what is saved."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from pocl_dist.config.section import Fraction, Line, Section, Text


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
    full_logits: bool = False
    """Take the models' own logits of all tokens: for heads that are no linear map; needs memory."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Fuse the element-wise part with torch.compile; auto: for a large vocabulary, if it can."""


class OptimizerConfig(Section):
    """AdamW with a cosine that restarts at every stage."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak of the cosine."""
    min_learning_rate: Annotated[float, Field(ge=0)] = 1e-7
    """End of the cosine."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Linear warm-up at the start of every stage."""
    restart_steps: list[Annotated[int, Field(ge=1)]] = []
    """With one stage: the steps before which the cosine starts anew, as it does at a change of
    stage (and AdamW's moments, with `curriculum.optimizer: reset`)."""
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

    source: Literal["online", "cache_hidden", "cache_topk"] = "online"
    """Beside the student, in a ZeRO-3 engine; or run once (`pocl-dist cache`): exact, or top-k."""
    top_k: Annotated[int, Field(ge=1)] = 256
    """`cache_topk`: tokens kept per position, the rest is one even tail; at most the vocabulary."""
    max_truncation_error: Annotated[float, Field(gt=0, le=1)] = 0.1
    """`cache_topk`: bound on the mean total variation to the teacher, at every temperature."""
    cache_engine: Literal["ray", "zero3"] = "ray"
    """Who fills the cache: Ray actors, or the ranks with the teacher partitioned over them."""
    cache_batch_size: Annotated[int, Field(ge=1)] = 8
    """Rows of like length per forward pass that fills the cache."""
    devices_per_actor: Annotated[int, Field(ge=1)] = 1
    """GPUs over which a Ray actor spreads the teacher's layers, for one larger than a GPU."""
    offload_param: Literal["none", "cpu"] = "none"
    """Where its partitioned weights lie between uses."""


class PolicyConfig(Section):
    """Whose answers are trained on: the data set's, or the student's own (GKD, DistiLLM)."""

    mode: Literal["off", "on", "mixed", "adaptive"] = "off"
    """`off`: the references; `on`: the student's answers; `mixed`: these in a share of the steps
    (GKD); `adaptive`: in more steps when the dev loss rises, with a replay buffer (DistiLLM)."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature of the student's answers; not the temperature of the loss."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus of the sampling."""
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    """Longest answer of the student; null: `generation.max_new_tokens`."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Prompts per call; ranks share the calls of a step, so up to global batch / this can work."""
    on_policy_ratio: Fraction = 0.5
    """`mixed`: probability that a step is on-policy; lambda of GKD."""
    initial_ratio: Fraction = 0.0
    """`adaptive`: phi at the start, the probability that a step takes answers of the student."""
    ratio_increment: Fraction = 0.1
    """`adaptive`: phi grows by this when the dev loss has risen."""
    loss_tolerance: Annotated[float, Field(ge=0)] = 0.1
    """`adaptive`: a dev loss that rises by less than this does not count; nats per token."""
    replay_buffer_size: Annotated[int, Field(ge=1)] = 1000
    """`adaptive`: the student's latest answers that are kept to be trained on again."""


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
    max_waste: Annotated[float, Field(ge=0, le=1)] = 0.1
    """More padding and waiting for other ranks than this: up to twice as many micro-batches."""
    packing: bool = False
    """Several examples end to end in a row, kept apart by the attention: no padding."""
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
    """How long this attempt of the run may take, and where it keeps what is no result."""

    max_wallclock_minutes: Annotated[float, Field(gt=0)] | None = None
    """After this long the run saves and exits with code 75; leave room for a step and a save."""
    scratch_dir: Text | None = None
    """Folder on a disk of each node: compile caches, and a copy of the teacher cache that ranks
    read instead of the shared one; null: no copy, and compilers choose (mostly the home folder)."""
    max_restarts: Annotated[int, Field(ge=0)] = 0
    """How often `run` and `distill` start the ranks again after one was lost (exit code 71)."""


class NonFiniteConfig(Section):
    """What happens when a loss or a gradient is NaN or infinite. An overflow of fp16 is none."""

    max_in_row: Annotated[int, Field(ge=1)] = 3
    """So many steps in a row may be left out; with the last of them the run ends (exit code 76)."""
    max_dumps: Annotated[int, Field(ge=0)] = 10
    """Of the first so many the batch is written to `nonfinite/`, one file per rank."""
    rewind: bool = False
    """Instead of ending, go back to the last checkpoint and leave out the steps since then."""
    max_rewinds: Annotated[int, Field(ge=1)] = 2
    """How often, before the run ends after all."""


class ResumeConfig(Section):
    """What happens when a run is continued."""

    on_damage: Literal["fallback", "fail"] = "fallback"
    """A checkpoint that does not verify: use the one before, or stop with exit code 78."""
    strict_versions: bool = False
    """The run directory was written by other code or packages: stop (78) instead of warning."""


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
    asynchronous: bool = False
    """Training stands still only for the copy to host memory; a thread of each rank writes."""
    mtbf_hours: Annotated[float, Field(gt=0)] = 24.0
    """Mean time between failures of the job: only for the interval that the log suggests."""


class ExportConfig(Section):
    """The result."""

    select: Literal["last", "best_dev"] = "last"
    """The weights after the last step, or those with the best dev metric."""


class LogConfig(Section):
    """What is shown and recorded besides `metrics.jsonl`."""

    output: Literal["auto", "quiet", "json"] = "auto"
    """On stdout: lines, on a terminal a live display; nothing; JSON lines (docs/observing.md)."""
    every: Annotated[int, Field(ge=1)] = 10
    """Steps between lines when the output is no terminal."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] | None = None
    """Who else gets the numbers of `metrics.jsonl`; null: TensorBoard, if it is installed."""
    project: Line = "pocl_dist"
    """Under which name trackers file the run: project, or experiment."""
    run_name: Line | None = None
    """Its name there; null: the name of the run directory."""
    wandb_mode: Literal["offline", "online"] = "offline"
    """`offline`: files in the run directory, for `wandb sync`; `online`: with $WANDB_API_KEY."""
    mlflow_uri: Line | None = None
    """Tracking server; null: files in the run directory. User and password from the environment."""
    trackio_space: Line | None = None
    """Hub space (OWNER/NAME) that shows the run; null: a database in the run directory."""
