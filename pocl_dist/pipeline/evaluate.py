"""Step 4: the export answers the test sets; ROUGE-L and exact match, mean and spread over seeds.

Everything is kept per model and test set, so a finished pair is not done again:

    eval/<set>/answers.jsonl   one row per example and seed; `answers-teacher.jsonl` for a baseline
    eval/<set>/inputs.json     what the answers are made from
    eval/<set>/report.json     the figures, in percent, unrounded
    eval/table.md              models x test sets
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pocl_dist.config import Config, select_keys
from pocl_dist.data.sources import Rows
from pocl_dist.difficulty.work import WorkShard, make_batches, make_shards
from pocl_dist.errors import MissingInputError
from pocl_dist.files import JSONValue, atomic_write_json, atomic_write_text
from pocl_dist.metrics import exact_match, rouge_l
from pocl_dist.models.sources import ModelFolder
from pocl_dist.pipeline.difficulty_files import model_inputs
from pocl_dist.pipeline.eval_report import write_reports
from pocl_dist.pipeline.inputs import make_encoder, read_eval_sets, student_source, teacher_source
from pocl_dist.pipeline.progress import RowProgress, say
from pocl_dist.pipeline.run_directory import RunDirectory, check_made_from

if TYPE_CHECKING:
    from pocl_dist.data.encoding import Encoder
    from pocl_dist.difficulty.worker import WorkerSettings
    from pocl_dist.pipeline.stop_request import StopRequest

STUDENT = "student"
_INPUT_KEYS = (
    "evaluate.do_sample",
    "evaluate.temperature",
    "evaluate.top_p",
    "evaluate.no_repeat_ngram_size",
    "evaluate.seeds",
    "generation",
    "data.eval_limit",
    "data.template",
    "data.max_tokens",
    "data.max_prompt_tokens",
    "engine.dtype",
    "ray.cpus_per_actor",
)


@dataclass(frozen=True)
class Pair:
    """One model on one test set, and its files."""

    model: str
    set_name: str
    rows: Rows
    folder: Path

    def file(self, stem: str, suffix: str) -> Path:
        """Returns the pair's file; those of the student itself carry no model name."""
        return self.folder / (
            f"{stem}{suffix}" if self.model == STUDENT else f"{stem}-{self.model}{suffix}"
        )


def evaluate(config: Config, run: RunDirectory) -> None:
    """Writes `eval/`: answers and reports of the export, and of the baselines if asked for.

    1. refuse answers that were made from other inputs; 2. let each model answer what is missing,
    all in one Ray session; 3. write the reports. Raises MissingInputError (66) without an export.
    """
    if not (run.export / "config.json").exists():
        raise MissingInputError(
            f"{run.export} holds no exported student: run `pocl-dist distill` first"
        )
    sets = read_eval_sets(config)
    if not sets:
        say("evaluate: data.eval names no test set")
        return
    models = _models(config, run)
    digests = {name: model_inputs(f"{name} model", source) for name, source in models.items()}
    pairs = [
        Pair(model, name, rows, run.eval / name) for model in models for name, rows in sets.items()
    ]
    for pair in pairs:
        _check_inputs(config, pair, digests[pair.model])
    missing = [pair for pair in pairs if not pair.file("answers", ".jsonl").exists()]
    if missing:
        _answer(config, run, models, digests, missing)
    else:
        say(f"evaluate: {len(pairs)} pairs of model and test set are answered already")
    student_digest = str(digests[STUDENT][f"{STUDENT} model sha256"])
    write_reports(run.eval, list(sets), list(models), student_digest)


def _models(config: Config, run: RunDirectory) -> dict[str, ModelFolder]:
    """Returns {name: model}: the export; with `evaluate.baselines` teacher and student before."""
    models = {
        STUDENT: ModelFolder(run.export, str(run.export), config.models.student.trust_remote_code)
    }
    if config.evaluate.baselines:
        teacher = teacher_source(config, run)
        if teacher is not None:
            models["teacher"] = teacher
        models["student_before"] = student_source(config, run)
    return models


def config_keys(config: Config) -> dict[str, JSONValue]:
    """Returns the config keys that answers depend on."""
    return select_keys(config, _INPUT_KEYS)


def _check_inputs(config: Config, pair: Pair, model_digests: dict[str, JSONValue]) -> None:
    inputs = (
        config_keys(config)
        | model_digests
        | {f"data.eval {pair.set_name} sha256": pair.rows.digest}
    )
    path = pair.file("inputs", ".json")
    if not check_made_from(path, inputs):
        atomic_write_json(path, inputs)


def _seeds(config: Config) -> list[int]:
    """Returns the seeds of the passes; greedy answers are the same for all, so one will do."""
    return config.evaluate.seeds if config.evaluate.do_sample else config.evaluate.seeds[:1]


def _answer(
    config: Config,
    run: RunDirectory,
    models: dict[str, ModelFolder],
    digests: dict[str, dict[str, JSONValue]],
    missing: Sequence[Pair],
) -> None:
    from pocl_dist.distributed.ray_session import ray_session
    from pocl_dist.models.loading import load_tokenizer
    from pocl_dist.pipeline.actor_pass import stop_request, worker_settings

    # One encoder for all models: they share a tokenizer, and the student's
    # template is what was trained.
    encoder = make_encoder(config, load_tokenizer(models[STUDENT]))
    limit = config.run.max_wallclock_minutes
    with stop_request(run, limit) as stop, ray_session(config.ray):
        for model, source in models.items():
            pairs = [pair for pair in missing if pair.model == model]
            if pairs:
                digest = str(digests[model][f"{model} model sha256"])
                settings = worker_settings(config, source, digest, config.evaluate)
                _answer_with(config, stop, settings, pairs, encoder)


def _answer_with(
    config: Config,
    stop: StopRequest,
    settings: WorkerSettings,
    pairs: Sequence[Pair],
    encoder: Encoder,
) -> None:
    """Lets one model answer its test sets, all seeds; writes each set when its last shard is in."""
    from pocl_dist.difficulty.worker import Answers
    from pocl_dist.pipeline.actor_pass import answer_shards

    shards: dict[str, WorkShard] = {}
    pass_of: dict[str, tuple[Pair, int]] = {}
    for pair in pairs:
        for seed in _seeds(config):
            for shard in _shards(config, pair, seed, encoder):
                name = f"{pair.set_name}, seed {seed}, {shard.name}"
                shards[name], pass_of[name] = shard, (pair, seed)
    num_open = Counter(pair.set_name for pair, _ in pass_of.values())
    texts: dict[str, dict[int, dict[str, str]]] = {pair.set_name: {} for pair in pairs}
    progress = RowProgress(
        f"evaluate {pairs[0].model}", sum(shard.num_rows for shard in shards.values())
    )
    for name, result in answer_shards(config, stop, settings, "answer", shards, progress):
        assert isinstance(result, Answers)
        pair, seed = pass_of[name]
        texts[pair.set_name].setdefault(seed, {}).update(result.text_of_id)
        num_open[pair.set_name] -= 1
        if not num_open[pair.set_name]:
            _write_answers(pair, texts.pop(pair.set_name))


def _shards(config: Config, pair: Pair, seed: int, encoder: Encoder) -> list[WorkShard]:
    """Returns one shard per batch: nothing is saved per shard, and short ones share out best."""
    encoded = [encoder.encode(example) for example in pair.rows.examples]
    references = {example.example_id: () for example in pair.rows.examples}
    batch_size = config.generation.batch_size
    batches = make_batches(encoded, references, batch_size)
    return [WorkShard(shard.batches, seed) for shard in make_shards(batches, batch_size)]


def _write_answers(pair: Pair, text_of_seed: dict[int, dict[str, str]]) -> None:
    lines = []
    for seed, texts in sorted(text_of_seed.items()):
        for example in pair.rows.examples:
            answer = texts[example.example_id]
            row = {
                "id": example.example_id,
                "seed": seed,
                "prompt": example.prompt,
                "context": example.context,
                "references": list(example.references),
                "answer": answer,
                "rouge_l": rouge_l(answer, example.references),
                "exact_match": exact_match(answer, example.references),
            }
            lines.append(json.dumps(row, ensure_ascii=False))
    atomic_write_text(pair.file("answers", ".jsonl"), "\n".join(lines) + "\n")
