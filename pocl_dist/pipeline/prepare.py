"""Makes ready to train: inputs compared over the ranks, engines built, state resumed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from pocl_dist.config import Config
from pocl_dist.curriculum.coordinator import Coordinator, Progress
from pocl_dist.display.output import say
from pocl_dist.display.training import TrainingDisplay
from pocl_dist.distributed.checkpoint import (
    Checkpoint,
    agree_on_digest,
    find_checkpoint,
)
from pocl_dist.distributed.checkpoint_write import CheckpointWriter
from pocl_dist.distributed.collectives import barrier, on_any_rank
from pocl_dist.distributed.engine import num_micro_batches
from pocl_dist.distributed.process_group import Rank, torch_dtype
from pocl_dist.files import JSONValue, atomic_write_json, digest_of
from pocl_dist.models.loading import load_tokenizer, tokenizer_digest
from pocl_dist.models.sources import model_digest
from pocl_dist.models.tokenizer_checks import check_same_tokenizer
from pocl_dist.on_policy.policy import OnPolicy
from pocl_dist.on_policy.replay_buffer import KIND as REPLAY
from pocl_dist.on_policy.replay_buffer import stored_ids
from pocl_dist.pipeline.cache_inputs import cached_teacher
from pocl_dist.pipeline.inputs import (
    encode_all,
    make_encoder,
    read_dev,
    read_train,
    result_inputs,
    student_source,
    teacher_source,
)
from pocl_dist.pipeline.plan_files import plan_digest, ranked_rows, read_plan
from pocl_dist.pipeline.quarter_rows import quarter_rows
from pocl_dist.pipeline.run_directory import RunDirectory, check_made_from
from pocl_dist.pipeline.run_lock import check_not_fenced
from pocl_dist.pipeline.student_engine import student_engine
from pocl_dist.pipeline.train_rows import EncodedRows, check_rows
from pocl_dist.records import EncodedExample, Example, Plan
from pocl_dist.run_log import MetricsLog
from pocl_dist.teacher.base import Teacher
from pocl_dist.teacher.online import OnlineTeacher
from pocl_dist.trackers.sender import Trackers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pocl_dist.models.sources import ModelFolder
from pocl_dist.pipeline.training import Training


def prepare_training(config: Config, run: RunDirectory, rank: Rank) -> Training:
    """Loads all that the loop needs, resumed from the newest good checkpoint if any. Collective."""
    num_micro_batches(
        config.engine.global_batch_size, rank.world_size, config.engine.micro_batch_size
    )
    plan = read_plan(run.plan)
    rows, dev = read_train(config, is_read=True), read_dev(config)
    student, teacher_folder = student_source(config, run), teacher_source(config, run)
    tokenizer = load_tokenizer(student)
    if teacher_folder is not None:
        check_same_tokenizer(load_tokenizer(teacher_folder), tokenizer)
    inputs = _inputs(config, plan, rows.digest, student, teacher_folder, tokenizer)
    agree_on_digest(digest_of(inputs), rank, "config, data, model or plan")
    examples = EncodedRows(rows, make_encoder(config, tokenizer), ranked_rows(plan, rows))
    _record_inputs(run, inputs, examples, rank)

    checkpoint = find_checkpoint(run.checkpoints, rank, digest_of(inputs), config.resume.on_damage)
    writer = CheckpointWriter(run.checkpoints, rank, lambda: check_not_fenced(run.root))
    quarters = quarter_rows(config, run, examples, rank)
    coordinator = Coordinator(
        plan.stages, config, rank, has_dev=dev is not None, has_quarters=bool(quarters)
    )
    policy = _policy(config, plan, examples, rank, checkpoint)
    if checkpoint is not None:
        coordinator.progress = progress_of(checkpoint)
    teacher: Teacher | None = None
    if policy is None and not any(stage.kd_ratio > 0 for stage in plan.stages):
        teacher_folder = None  # nothing will be asked of it
    if teacher_folder is not None and config.teacher.source != "online":
        teacher = cached_teacher(config, run, rank, teacher_folder, rows, plan, examples)
    engine = student_engine(config, rank, student, tokenizer, checkpoint)
    if teacher_folder is not None and config.teacher.source == "online":
        teacher = OnlineTeacher(teacher_folder, config, rank, len(tokenizer))
    dev_rows = [] if dev is None else _with_tokens(dev.examples, tokenizer, config, rank)
    resume_step = -1 if checkpoint is None else checkpoint.step
    display = TrainingDisplay([stage.num_steps for stage in plan.stages], config.log.every)
    if rank.is_main:
        _say_start(config, rank, checkpoint)
    log = _log(run, resume_step, coordinator.progress) if rank.is_main else None
    return Training(
        config=config,
        run=run,
        rank=rank,
        plan=plan,
        inputs=inputs,
        examples=examples,
        dev_rows=dev_rows,
        quarters=quarters,
        student=student,
        tokenizer=tokenizer,
        teacher=teacher,
        engine=engine,
        coordinator=coordinator,
        policy=policy,
        writer=writer,
        log=log,
        trackers=Trackers(config, run.root, resume_step, log.written_before) if log else None,
        display=display,
    )


def _record_inputs(
    run: RunDirectory, inputs: dict[str, JSONValue], examples: EncodedRows, rank: Rank
) -> None:
    """Writes what the run is made from, or compares it with what is there. Collective."""
    record = run.checkpoints / "inputs.json"
    if on_any_rank(not check_made_from(record, inputs), rank):
        check_rows(examples, rank)  # an attempt that was resumed has done so
        if rank.is_main:
            atomic_write_json(record, inputs)
    barrier(rank)


def _with_tokens(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, config: Config, rank: Rank
) -> list[tuple[Example, EncodedExample]]:
    """Returns the dev rows, each with its tokens."""
    encoded = encode_all(examples, tokenizer, config, "dev", rank)
    return [(example, encoded[example.example_id]) for example in examples]


def _log(run: RunDirectory, resume_step: int, progress: Progress) -> MetricsLog:
    """Returns the log. A stop saves before it evaluates: such lines may be there already."""
    done_at = {"dev": progress.evaluated_at, "quarters": progress.quarters_at}
    unfinished = [kind for kind, step in done_at.items() if step != resume_step]
    return MetricsLog(run.metrics, resume_step, unfinished)


def progress_of(checkpoint: Checkpoint) -> Progress:
    """Returns the coordinator's progress as it was saved."""
    progress = {name: v for name, v in checkpoint.state.items() if name != "policy"}
    return Progress(**progress)  # type: ignore[arg-type]


def _say_start(config: Config, rank: Rank, checkpoint: Checkpoint | None) -> None:
    engine = config.engine
    if checkpoint is not None:
        say(f"resumed from {checkpoint.folder} (step {checkpoint.step})")
    num_batches = num_micro_batches(
        engine.global_batch_size, rank.world_size, engine.micro_batch_size
    )
    say(
        f"distill: {rank.world_size} rank(s) on {rank.device.type}, ZeRO stage "
        f"{engine.zero_stage}, {torch_dtype(engine.dtype, rank.device)}, from {num_batches} "
        f"micro-batch(es) of at most {engine.micro_batch_size} rows per rank and step"
    )


def _policy(
    config: Config,
    plan: Plan,
    examples: EncodedRows,
    rank: Rank,
    checkpoint: Checkpoint | None,
) -> OnPolicy | None:
    if config.policy.mode == "off":
        return None
    policy = OnPolicy(config, sum(stage.num_steps for stage in plan.stages), rank)
    if checkpoint is not None:
        state = cast("dict[str, JSONValue]", checkpoint.state["policy"])
        tensors = dict(checkpoint.tensors(REPLAY))
        policy.restore(state, tensors, examples.of_ids(stored_ids(tensors)))
    if rank.is_main:
        say(
            f"policy {config.policy.mode}: steps on the student's own answers use the divergence "
            "alone (KD ratio 1, whatever curriculum.kd_ratio says)"
        )
    return policy


def _inputs(
    config: Config,
    plan: Plan,
    data_digest: str,
    student: ModelFolder,
    teacher: ModelFolder | None,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, JSONValue]:
    return {
        **result_inputs(config),
        "digest.data": data_digest,
        "digest.plan": plan_digest(plan),
        "digest.student": model_digest(student),
        "digest.teacher": None if teacher is None else model_digest(teacher),
        "digest.tokenizer": tokenizer_digest(tokenizer),
    }
