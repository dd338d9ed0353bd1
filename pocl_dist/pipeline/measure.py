"""Step 1: the student before training answers each prompt and scores each reference (POCL 3.1)."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pocl_dist.config import Config
from pocl_dist.data.columns import is_in, order_of, slices, text_array
from pocl_dist.data.sources import Rows
from pocl_dist.difficulty.fusion import tie_shares
from pocl_dist.difficulty.work import OpenShards, WorkRow
from pocl_dist.display.output import say, warn
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
    read_shards,
    remove_damaged_shards,
    write_difficulty,
)
from pocl_dist.pipeline.inputs import make_encoder, read_train, student_source
from pocl_dist.pipeline.quarantine import FILE, Quarantine
from pocl_dist.pipeline.run_directory import RunDirectory, check_made_from
from pocl_dist.pipeline.scores import read_scores
from pocl_dist.pipeline.server_answers import find_server, server_answers
from pocl_dist.records import DifficultyRecord

if TYPE_CHECKING:
    import pyarrow as pa

    from pocl_dist.data.encoding import Encoder
    from pocl_dist.difficulty.worker import ShardResult, WorkerSettings

# Above this share of ties a signal says little about the order.
TIE_WARNING = 0.5


@dataclass(frozen=True)
class _Lengths:
    """What is known of the rows once each was encoded; they are not held."""

    num_tokens: np.ndarray  # of prompt and response, by row
    num_prompts_cut: int
    num_responses_cut: int


def measure(config: Config, run: RunDirectory) -> None:
    """Writes `difficulty/`: one record per training row, then the summary.

    1. refuse scores that were made from other inputs, remove damaged ones; 2. encode each row once
    and cut all into batches of like length; 3. let the server, if the config names one, answer;
    4. send the batches that are not done to the actors and save each shard; 5. summarise.
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
    ids = rows.ids()
    is_done = is_in(ids, read_scores(run.difficulty).ids) | is_in(
        ids, text_array(quarantine.read())
    )
    is_finished = bool(is_done.all())
    if is_finished and (run.difficulty / "summary.json").exists():
        say(f"measure: {len(ids)} rows are measured already")
        return
    started = time.monotonic()
    uses_server = config.measure.engine == "server" and not is_finished
    server = find_server(config) if uses_server else None
    encoder = _encoder(config, source)
    lengths = _measure_lengths(rows, encoder)
    if not is_finished:
        from pocl_dist.pipeline.actor_pass import worker_settings

        settings = worker_settings(config, source, str(inputs["models.student model sha256"]))
        is_left_out = is_in(ids, text_array(quarantine.unworkable()))
        in_order = by_length(lengths.num_tokens, ids)
        shards = _open_shards(
            config, rows, encoder, in_order, lengths.num_tokens, is_done, is_left_out
        )
        if server is not None:
            shards.with_answers(server_answers(config, run, shards, rows, server))
        _work_off(config, run, settings, shards, len(ids), quarantine)
    _summarise(run, lengths, time.monotonic() - started)


def _encoder(config: Config, source: ModelFolder) -> Encoder:
    from pocl_dist.models.loading import load_tokenizer

    return make_encoder(config, load_tokenizer(source))


def _measure_lengths(rows: Rows, encoder: Encoder) -> _Lengths:
    num_tokens = np.zeros(len(rows.examples), dtype=np.int32)
    num_prompts = num_responses = 0
    for place, row in enumerate(rows.examples):
        example = encoder.encode(row)
        num_tokens[place] = len(example.token_ids)
        num_prompts += example.is_prompt_cut
        num_responses += example.is_response_cut
    for what, num_cut, key in (
        ("prompts", num_prompts, "data.max_prompt_tokens"),
        ("responses", num_responses, "data.max_tokens"),
    ):
        if num_cut:
            warn(f"{num_cut} of {len(num_tokens)} {what} are cut to {key}")
    return _Lengths(num_tokens, num_prompts, num_responses)


def by_length(num_tokens: np.ndarray, ids: pa.LargeStringArray) -> np.ndarray:
    """Returns the places of rows sorted by length, then id."""
    place_of_id = np.empty(len(ids), dtype=np.int32)
    place_of_id[order_of(ids)] = np.arange(len(ids), dtype=np.int32)
    return np.lexsort((place_of_id, num_tokens))


def _open_shards(
    config: Config,
    rows: Rows,
    encoder: Encoder,
    in_order: np.ndarray,
    num_tokens: np.ndarray,
    is_done: np.ndarray,
    is_left_out: np.ndarray,
) -> OpenShards:
    """Returns the shards of batches with a row not done, each whole: a part would pad otherwise."""

    def row(place: int) -> WorkRow:
        example = rows.examples[place]
        return WorkRow(encoder.encode(example), example.references[:1])

    sizes = config.generation.batch_size, config.ray.shard_size
    return OpenShards(row, in_order, num_tokens, *sizes, is_done, is_left_out)


def _work_off(
    config: Config,
    run: RunDirectory,
    settings: WorkerSettings,
    shards: OpenShards,
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

    with actors_of(config, run) as stop:
        answer_rows(
            config,
            stop,
            RowPass(
                "measure", "measure", settings, shards, num_rows, save, lambda name: quarantine
            ),
        )


def _mean(values: np.ndarray) -> float:
    numbers = (value for part in slices(len(values)) for value in values[part].tolist())
    return math.fsum(numbers) / len(values)


def _num_empty_answers(folder: Path) -> int:
    tables = (table for _, table in read_shards(folder, ["answer"]))
    return sum(not answer.strip() for table in tables for answer in table.column(0).to_pylist())


def _summarise(run: RunDirectory, lengths: _Lengths, seconds: float) -> None:
    scores = read_scores(run.difficulty)
    num_rows = len(scores.ids)
    if not num_rows:
        raise DataError(
            f"{run.difficulty}: no row has a finite score; are the student's weights sound?"
        )
    ties = tie_shares(scores.columns)
    quarantined = read_quarantine(run.difficulty).values()
    num_quarantined = len(quarantined)
    mean_rouge_l = _mean(scores.columns["rouge_l"])
    mean_cross_entropy = _mean(scores.columns["cross_entropy"])
    summary = {
        "num_examples": num_rows,
        "num_prompts_cut": lengths.num_prompts_cut,
        "num_responses_cut": lengths.num_responses_cut,
        "num_empty_answers": _num_empty_answers(run.difficulty),
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
        f"measure: {num_rows} rows in {seconds:.0f} s, "
        f"mean ROUGE-L {100 * mean_rouge_l:.2f} %, mean cross-entropy {mean_cross_entropy:.4f}"
    )
