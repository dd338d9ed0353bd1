"""The teacher answers every training prompt; its answers become a data set (SeqKD)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pocl_dist.config import Config
from pocl_dist.data.sources import Rows
from pocl_dist.difficulty.work import WorkBatch, WorkShard, make_batches, make_shards, open_batches
from pocl_dist.display.output import say, warn
from pocl_dist.errors import ConfigError
from pocl_dist.files import JSONValue, atomic_write_json
from pocl_dist.models.sources import ModelFolder
from pocl_dist.pipeline import generated_files as files
from pocl_dist.pipeline.answer_files import AnswerFiles
from pocl_dist.pipeline.difficulty_files import model_inputs
from pocl_dist.pipeline.inputs import make_encoder, read_prompts, student_source, teacher_source
from pocl_dist.pipeline.quarantine import FILE, Quarantine
from pocl_dist.pipeline.run_directory import RunDirectory, check_made_from

if TYPE_CHECKING:
    from pocl_dist.difficulty.worker import ShardResult, WorkerSettings
    from pocl_dist.records import EncodedExample


def generate(config: Config, run: RunDirectory) -> None:
    """Writes the data set of the teacher's answers, `generated/train.jsonl` or `generate.output`.

    1. refuse answers that were made from other inputs; 2. let the teacher answer what is missing
    and save each shard; 3. write the rows, in the order of `data.train`, and where they come from.
    An interrupted pass goes on with what is missing; a finished one returns at once.
    """
    teacher = teacher_source(config, run)
    if teacher is None:
        raise ConfigError("models.teacher: null, but generate asks the teacher for answers")
    rows = read_prompts(config)
    inputs: dict[str, JSONValue] = {
        **files.config_inputs(config),
        **model_inputs("models.teacher model", teacher),
        "data.train sha256": rows.digest,
    }
    record = run.generated / "inputs.json"
    if not check_made_from(record, inputs):
        atomic_write_json(record, inputs)
    if files.is_written(config, inputs):
        say(f"generate: {files.output_file(config)} is there")
        return
    shards = AnswerFiles(run.generated)
    quarantine = Quarantine(run.generated / FILE, config.data.max_bad_rows)
    batches = _open_batches(
        config,
        rows,
        _encode(config, run, rows, teacher),
        set(shards.read()),
        quarantine.unworkable(),
    )
    if batches:
        digest = str(inputs["models.teacher model sha256"])
        from pocl_dist.pipeline.actor_pass import worker_settings

        settings = worker_settings(config, teacher, digest, config.generate)
        _work_off(config, run, settings, batches, len(rows.examples), quarantine)
    answers, failures, num_halved = shards.read(), quarantine.read(), shards.count_halved()
    unusable = files.write_data_set(
        config, run, rows.examples, answers, inputs, failures, num_halved
    )
    if unusable:
        warn(
            f"{len(unusable)} answers are missing, empty or no text; their rows are not in the "
            "data set (generated/unusable.jsonl)"
        )
    say(
        f"generate: {len(rows.examples) - len(unusable)} rows in {files.output_file(config)}, "
        f"answered by {teacher.origin}"
    )


def _encode(
    config: Config, run: RunDirectory, rows: Rows, teacher: ModelFolder
) -> list[EncodedExample]:
    """Returns the rows encoded as they will be for training: with the student's tokenizer."""
    from pocl_dist.models.loading import load_tokenizer
    from pocl_dist.models.tokenizer_checks import check_same_tokenizer

    tokenizer = load_tokenizer(teacher)
    if config.models.student.path is not None:  # else it is cut from the teacher
        tokenizer, of_teacher = load_tokenizer(student_source(config, run)), tokenizer
        check_same_tokenizer(of_teacher, tokenizer)
    encoder = make_encoder(config, tokenizer)
    encoded = [encoder.encode(example) for example in rows.examples]
    num_cut = sum(example.is_prompt_cut for example in encoded)
    if num_cut:
        warn(f"{num_cut} of {len(encoded)} prompts are cut to data.max_prompt_tokens")
    return encoded


def _open_batches(
    config: Config,
    rows: Rows,
    encoded: list[EncodedExample],
    done: set[str],
    left_out: set[str],
) -> list[WorkBatch]:
    """Returns the batches with a row not done. They are whole: a part would be drawn anew."""
    references: dict[str, tuple[str, ...]] = {row.example_id: () for row in rows.examples}
    batches = make_batches(encoded, references, config.generation.batch_size)
    return open_batches(batches, done, left_out)


def _work_off(
    config: Config,
    run: RunDirectory,
    settings: WorkerSettings,
    batches: list[WorkBatch],
    num_rows: int,
    quarantine: Quarantine,
) -> None:
    from pocl_dist.pipeline.actor_pass import RowPass, actors_of, answer_rows

    def save(name: str, result: ShardResult[str]) -> None:
        AnswerFiles(run.generated).write(name, result.value_of_id, result.num_halved)

    shards = {
        shard.name: WorkShard(shard.batches, config.generate.seed)
        for shard in make_shards(batches, config.ray.shard_size)
    }
    with actors_of(config, run) as stop:
        answer_rows(
            config,
            stop,
            RowPass(
                "generate", "answer", settings, shards, num_rows, save, lambda name: quarantine
            ),
        )
