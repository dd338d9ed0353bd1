"""Every config key: type, bounds, default and meaning. This is the only place for defaults.

All models are frozen and strict: an unknown key, a string where a number belongs, or a value out of
range is an error. What a key promises works, or is refused; there are no keys for later.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    StringConstraints,
    Tag,
)

Text = Annotated[str, StringConstraints(min_length=1, pattern=r"^[^\x00]*$")]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of all sections."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class ModelConfig(Section):
    """Where a model comes from."""

    path: Text
    """Local folder, GGUF file, `package:IMPORT_NAME/FILE`, or hub id."""
    revision: Text | None = None
    """Branch, tag or commit of a hub id; it is resolved once and the commit recorded."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""


class StudentConfig(Section):
    """The model that is trained. Without `path` it is cut from the teacher by `init_layers`."""

    path: Text | None = None
    """As `models.teacher.path`; null with `init_layers`: the student is made from the teacher."""
    init_layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """Teacher layers that the student keeps, ascending (depth pruning)."""
    revision: Text | None = None
    """As `models.teacher.revision`."""
    trust_remote_code: bool = False
    """As `models.teacher.trust_remote_code`."""


class ModelsConfig(Section):
    """Teacher and student."""

    teacher: ModelConfig | None
    """The frozen teacher; null trains the student by SFT alone (teacher fine-tuning)."""
    student: StudentConfig
    """The model that is trained."""


class DataConfig(Section):
    """Rows, template and lengths."""

    train: Text
    """JSONL/Parquet file, `package:IMPORT_NAME/FILE` or hub id `OWNER/NAME[@REVISION][#SPLIT]`."""
    dev: Text | None = None
    """Rows for the dev metric; null: none is computed."""
    eval: list[Text] = []
    """Test sets of `evaluate`."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Use the first rows of `train` only."""
    dev_limit: Annotated[int, Field(ge=1)] | None = None
    """Use the first rows of `dev` only."""
    eval_limit: Annotated[int, Field(ge=1)] | None = None
    """Use the first rows of each test set only."""
    template: Text = "alpaca"
    """`alpaca` (as published), `short`, `chat` (the tokenizer's), or text with `{prompt}` in it."""
    max_tokens: Annotated[int, Field(ge=2)] = 512
    """Prompt + response + eos; a longer response is cut at its end."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] = 256
    """A longer prompt is cut on the left of its content; the response marker stays."""
    on_bad_row: Literal["fail", "quarantine"] = "fail"
    """`fail` stops with exit code 65; `quarantine` lists bad rows in a file and goes on."""
    max_bad_rows: Annotated[int, Field(ge=0)] = 100
    """With `quarantine`: more bad rows than this in one file stop the run all the same."""


class ScheduleConfig(Section):
    """How a value goes over the stages."""

    schedule: Literal["linear", "cosine", "constant"]
    """Shape over the stages; `constant` stays at `start`."""
    start: float
    """Value of the first stage."""
    end: float | None = None
    """Value of the last stage; not used by `constant`."""


def _schedule_form(value: object) -> str | None:
    if isinstance(value, (dict, ScheduleConfig)):
        return "[schedule]"
    if isinstance(value, list):
        return "[table]"
    return "[number]" if isinstance(value, (int, float)) and not isinstance(value, bool) else None


# The form is told apart first, so that a mistake in it gives one complaint and
# not one per alternative.
Schedule = Annotated[
    Annotated[ScheduleConfig, Tag("[schedule]")]
    | Annotated[list[float], Field(min_length=1), Tag("[table]")]
    | Annotated[float, Tag("[number]")],
    Discriminator(
        _schedule_form,
        custom_error_type="schedule_form",
        custom_error_message="must be a number, a list with one number per stage, "
        "or {schedule, start, end}",
    ),
]


class CurriculumConfig(Section):
    """Ranking, stages and what changes between them (POCL sections 3.1 and 3.2)."""

    num_stages: Annotated[int, Field(ge=1)] = 4
    """Parts of the ranking; 1 is plain distillation: T = 1, ratio 1, one cosine."""
    epochs_per_stage: Annotated[float, Field(gt=0)] = 8.0
    """Passes over a stage's examples; not used when `visits_per_example` is set."""
    visits_per_example: Annotated[float, Field(gt=0)] | None = None
    """Mean visits of an example over all stages; sets equal epochs (fractions allowed) for all."""
    temperature: Schedule = ScheduleConfig(schedule="linear", start=1.0, end=2.0)
    """A number, one value per stage, or a schedule."""
    kd_ratio: Schedule = ScheduleConfig(schedule="linear", start=0.7, end=1.0)
    """Share of the distillation loss; the rest is cross-entropy. As `temperature`."""
    ordering: Literal["curriculum", "shuffled", "reversed"] = "curriculum"
    """Easy to hard, or the two controls: random parts, hard to easy."""
    advance: Literal["fixed", "converged"] = "fixed"
    """`converged` ends a stage early when the dev metric has not improved `patience` times."""
    patience: Annotated[int, Field(ge=1)] = 2
    """Dev evaluations without improvement that end a stage."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Smaller gains of the dev metric do not count as improvement."""
    optimizer: Literal["reset", "keep"] = "reset"
    """AdamW moments at a stage change."""
    rrf_k: Annotated[float, Field(gt=0)] = 60.0
    """k of reciprocal rank fusion."""


class DevConfig(Section):
    """The dev metric during training."""

    metric: Literal["rouge_l", "loss"] = "rouge_l"
    """ROUGE-L of greedy answers (higher is better), or cross-entropy (lower is better)."""
    every: Annotated[int, Field(ge=1)] | None = None
    """Steps between dev evaluations, besides those at stage ends; null: at stage ends only."""


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


class GenerationConfig(Section):
    """Greedy answers: measure, dev metric, and evaluate unless it samples."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest answer."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Prompts per call. Part of the result's identity: another padding is another rounding."""


class EvaluateConfig(Section):
    """Answers on the test sets."""

    do_sample: bool = False
    """Sample instead of greedy; one pass per seed."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature; not the temperature of the loss."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus of the sampling."""
    no_repeat_ngram_size: Annotated[int, Field(ge=0)] = 0
    """6 as published; 0: off."""
    seeds: Annotated[list[int], Field(min_length=1)] = [10]
    """Seeds of the sampled passes; greedy needs one."""
    baselines: bool = False
    """Also evaluate the teacher and the student before training."""


class TeacherConfig(Section):
    """How the teacher is run."""

    source: Literal["online"] = "online"
    """The teacher runs beside the student, in a ZeRO-3 engine of its own."""
    offload_param: Literal["none", "cpu"] = "none"
    """Where its partitioned weights lie between uses."""


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


class RayConfig(Section):
    """The actors of measure and evaluate."""

    address: Text | None = None
    """An existing cluster; null starts a local Ray with token authentication, without dashboard."""
    num_actors: Annotated[int, Field(ge=1)] | None = None
    """Model copies; null: one per GPU, or as many as the CPUs allow."""
    cpus_per_actor: Annotated[int, Field(ge=1)] = 1
    """Threads of each actor. Part of the result's identity on CPU."""
    shard_size: Annotated[int, Field(ge=1)] = 128
    """Rows per task, rounded up to whole batches: the unit that is saved and retried."""
    start_timeout_seconds: Annotated[float, Field(gt=0)] = 120.0
    """No Ray or no actor after this long: exit code 69."""


class CheckpointConfig(Section):
    """What is saved on the way."""

    every: Annotated[int, Field(ge=1)] | None = None
    """Steps between checkpoints, besides those at stage ends and stops; null: stage ends only."""
    keep_last: Annotated[int, Field(ge=1)] = 2
    """Older checkpoints are removed."""


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


class PolicyConfig(Section):
    """Whose answers are trained on."""

    mode: Literal["off"] = "off"
    """`off`: the references of the data set."""


class Config(Section):
    """All keys of a run."""

    run_dir: Text
    """Folder of everything the run writes; the same command on it continues."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    """Order of examples, shuffled ordering, initialisation."""
    models: ModelsConfig
    data: DataConfig
    curriculum: CurriculumConfig = CurriculumConfig()
    dev: DevConfig = DevConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    generation: GenerationConfig = GenerationConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    teacher: TeacherConfig = TeacherConfig()
    policy: PolicyConfig = PolicyConfig()
    engine: EngineConfig = EngineConfig()
    ray: RayConfig = RayConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()
    log: LogConfig = LogConfig()
