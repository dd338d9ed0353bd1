"""Step 1: the student before training answers each prompt and scores each reference (POCL 3.1)."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pocl_dist.config import Config
from pocl_dist.data.sources import Rows
from pocl_dist.difficulty.fusion import tie_shares
from pocl_dist.difficulty.work import WorkBatch, make_batches, make_shards, open_batches
from pocl_dist.errors import DataError, MissingInputError
from pocl_dist.files import atomic_write_json
from pocl_dist.models.sources import ModelFolder
from pocl_dist.pipeline.difficulty_files import (
    config_inputs,
    count_halved_batches,
    is_scored,
    model_inputs,
    not_finite,
    read_quarantine,
    read_records,
    remove_damaged_shards,
    write_difficulty,
)
from pocl_dist.pipeline.inputs import make_encoder, read_train, student_source
from pocl_dist.pipeline.progress import say, warn
from pocl_dist.pipeline.quarantine import FILE, Quarantine
from pocl_dist.pipeline.run_directory import RunDirectory, check_made_from
from pocl_dist.pipeline.server_answers import find_server, with_answers
from pocl_dist.records import DifficultyRecord, EncodedExample

if TYPE_CHECKING:
    from pocl_dist.difficulty.worker import ShardResult, WorkerSettings

# Above this share of ties a signal says little about the order.
TIE_WARNING = 0.5


def measure(config: Config, run: RunDirectory) -> None:
    """Writes `difficulty/`: one record per training row, then the summary.

    1. refuse scores that were made from other inputs, remove damaged ones; 2. encode all rows and
    cut them into batches; 3. let the server, if the config names one, answer; 4. send the batches
    that are not done to the actors and save each shard; 5. summarise.
    An interrupted pass goes on with what is missing; a finished one returns at once.
    """
    rows = read_train(config)
    source = student_source(config, run)
    if not (source.folder / "config.json").exists():
        raise MissingInputError(
            f"models.student: {source.folder} is not there yet: run `pocl-dist init-student` first"
        )
    inputs = config_inputs(config, rows) | model_inputs("models.student model", source)
    if not check_made_from(run.difficulty / "inputs.json", inputs):
        atomic_write_json(run.difficulty / "inputs.json", inputs)
    for damage in remove_damaged_shards(run.difficulty):
        warn(f"{damage}; it is computed again")
    quarantine = Quarantine(run.difficulty / FILE, config.data.max_bad_rows)
    done = {record.example_id for record in read_records(run.difficulty)} | set(quarantine.read())
    is_finished = done >= set(rows.by_id())
    if is_finished and (run.difficulty / "summary.json").exists():
        say(f"measure: {len(done)} rows are measured already")
        return
    started = time.monotonic()
    uses_server = config.measure.engine == "server" and not is_finished
    server = find_server(config) if uses_server else None
    encoded = _encode(config, rows, source)
    if not is_finished:
        from pocl_dist.pipeline.actor_pass import worker_settings

        settings = worker_settings(config, source, str(inputs["models.student model sha256"]))
        batches = _open_batches(config, rows, encoded, done, quarantine.unworkable())
        if server is not None:
            batches = with_answers(config, run, batches, rows, server)
        _work_off(config, run, settings, batches, len(rows.examples), quarantine)
    _summarise(run, encoded, time.monotonic() - started)


def _encode(config: Config, rows: Rows, source: ModelFolder) -> list[EncodedExample]:
    from pocl_dist.models.loading import load_tokenizer

    encoder = make_encoder(config, load_tokenizer(source))
    encoded = [encoder.encode(example) for example in rows.examples]
    for what, num_cut, key in (
        ("prompts", sum(example.is_prompt_cut for example in encoded), "data.max_prompt_tokens"),
        ("responses", sum(example.is_response_cut for example in encoded), "data.max_tokens"),
    ):
        if num_cut:
            warn(f"{num_cut} of {len(encoded)} {what} are cut to {key}")
    return encoded


def _open_batches(
    config: Config,
    rows: Rows,
    encoded: Sequence[EncodedExample],
    done: set[str],
    left_out: set[str],
) -> list[WorkBatch]:
    """Returns the batches with a row not done. They are whole: a part would pad differently."""
    references = {example.example_id: example.references[:1] for example in rows.examples}
    batches = make_batches(encoded, references, config.generation.batch_size, is_scored=True)
    return open_batches(batches, done, left_out)


def _work_off(
    config: Config,
    run: RunDirectory,
    settings: WorkerSettings,
    batches: Sequence[WorkBatch],
    num_rows: int,
    quarantine: Quarantine,
) -> None:
    from pocl_dist.pipeline.actor_pass import RowPass, actors_of, answer_rows

    def save(name: str, result: ShardResult[DifficultyRecord]) -> None:
        """Writes a shard's scored rows, others to quarantine first: its file says "done"."""
        records = result.value_of_id.values()
        quarantine.add([not_finite(record) for record in records if not is_scored(record)])
        scored = [record for record in records if is_scored(record)]
        write_difficulty(run.difficulty, name, scored, result.num_halved)

    shards = {shard.name: shard for shard in make_shards(batches, config.ray.shard_size)}
    with actors_of(config, run) as stop:
        answer_rows(
            config,
            stop,
            RowPass(
                "measure", "measure", settings, shards, num_rows, save, lambda name: quarantine
            ),
        )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _summarise(run: RunDirectory, encoded: Sequence[EncodedExample], seconds: float) -> None:
    records = read_records(run.difficulty)
    if not records:
        raise DataError(
            f"{run.difficulty}: no row has a finite score; are the student's weights sound?"
        )
    ties = tie_shares(records)
    quarantined = read_quarantine(run.difficulty).values()
    num_quarantined = len(quarantined)
    mean_rouge_l = _mean([record.rouge_l for record in records])
    mean_cross_entropy = _mean([record.cross_entropy for record in records])
    summary = {
        "num_examples": len(records),
        "num_prompts_cut": sum(example.is_prompt_cut for example in encoded),
        "num_responses_cut": sum(example.is_response_cut for example in encoded),
        "num_empty_answers": sum(not record.answer.strip() for record in records),
        "num_quarantined": num_quarantined,
        "num_quarantined_by_cause": dict(Counter(row.cause for row in quarantined)),
        "num_halved_batches": count_halved_batches(run.difficulty),
        "tie_shares": ties,
        "mean_rouge_l": mean_rouge_l,
        "mean_cross_entropy": mean_cross_entropy,
        "seconds": seconds,  # of this attempt
    }
    atomic_write_json(run.difficulty / "summary.json", summary)
    if summary["num_halved_batches"]:
        warn(
            f"{summary['num_halved_batches']} batches did not fit into memory and were halved: "
            "their scores may differ from others' in the last bits (generation.batch_size)"
        )
    if num_quarantined:
        warn(
            f"{num_quarantined} rows have no finite score and are left out "
            "(difficulty/quarantine.jsonl)"
        )
    for name, share in ties.items():
        if share > TIE_WARNING:
            warn(f"{100 * share:.0f} % of the rows tie in {name}: it says little about their order")
    say(
        f"measure: {len(records)} rows in {seconds:.0f} s, "
        f"mean ROUGE-L {100 * mean_rouge_l:.2f} %, mean cross-entropy {mean_cross_entropy:.4f}"
    )
