"""Step 4: the export answers the test sets; ROUGE-L and exact match, mean and spread over seeds.

Everything is kept per model and test set, so a finished pair is not done again:

    eval/<set>/answers.jsonl   one row per example and seed; `answers-teacher.jsonl` for a baseline
    eval/<set>/inputs.json     what the answers are made from
    eval/<set>/shards/         answers until the set is complete, a sealed file per batch and seed
    eval/<set>/report.json     the figures, in percent, unrounded
    eval/table.md              models x test sets
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pocl_dist.config import Config, select_keys
from pocl_dist.difficulty.work import WorkShard, make_batches, make_shards, open_batches
from pocl_dist.display.output import say
from pocl_dist.errors import MissingInputError
from pocl_dist.files import JSONValue, atomic_write_json
from pocl_dist.models.sources import ModelFolder
from pocl_dist.pipeline.difficulty_files import model_inputs
from pocl_dist.pipeline.eval_answers import STUDENT, Pair, remove_shards, write_answers
from pocl_dist.pipeline.eval_report import write_reports
from pocl_dist.pipeline.harness import check_harness, run_harness
from pocl_dist.pipeline.inputs import make_encoder, read_eval_sets, student_source, teacher_source
from pocl_dist.pipeline.model_card import update_card
from pocl_dist.pipeline.quarantine import Quarantine
from pocl_dist.pipeline.run_directory import RunDirectory, check_made_from

if TYPE_CHECKING:
    from pocl_dist.data.encoding import Encoder
    from pocl_dist.data.sources import Rows
    from pocl_dist.difficulty.worker import ShardResult, WorkerSettings
    from pocl_dist.pipeline.stop_request import StopRequest

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


def evaluate(config: Config, run: RunDirectory) -> None:
    """Writes `eval/`: answers and reports of the export, and of the baselines if asked for.

    1. refuse answers that were made from other inputs; 2. let each model answer what is missing,
    all in one Ray session; 3. write the reports; 4. run the tasks of the harness, if any; 5. add
    the scores to the model card. Raises MissingInputError (66) without an export.
    """
    if not (run.export / "config.json").exists():
        raise MissingInputError(
            f"{run.export} holds no exported student: run `pocl-dist distill` first"
        )
    check_harness(config)
    sets = read_eval_sets(config)
    if sets:
        _evaluate_sets(config, run, sets)
    elif not config.evaluate.harness:
        say("evaluate: data.eval names no test set")
    if config.evaluate.harness:
        run_harness(config, run)
    update_card(run)


def _evaluate_sets(config: Config, run: RunDirectory, sets: Mapping[str, Rows]) -> None:
    models = _models(config, run)
    digests = {name: model_inputs(f"{name} model", source) for name, source in models.items()}
    pairs = [
        Pair(model, name, rows, run.eval / name) for model in models for name, rows in sets.items()
    ]
    for pair in pairs:
        _check_inputs(config, pair, digests[pair.model])
    missing = [pair for pair in pairs if not pair.file("answers", ".jsonl").exists()]
    for pair in pairs:
        if pair not in missing:
            remove_shards(pair)  # a killed attempt may have left them
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
    from pocl_dist.models.loading import load_tokenizer
    from pocl_dist.pipeline.actor_pass import actors_of, worker_settings

    # One encoder for all models: they share a tokenizer, and the student's
    # template is what was trained.
    encoder = make_encoder(config, load_tokenizer(models[STUDENT]))
    with actors_of(config, run) as stop:
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
    from pocl_dist.pipeline.actor_pass import RowPass, answer_rows

    shards: dict[str, WorkShard] = {}
    place_of: dict[str, tuple[Pair, int]] = {}
    for pair in pairs:
        for seed in _seeds(config):
            for shard in _open_shards(config, pair, seed, encoder):
                name = f"{pair.set_name}, seed {seed}, {shard.name}"
                shards[name], place_of[name] = shard, (pair, seed)
    num_open = Counter(pair.set_name for pair, _ in place_of.values())
    for pair in pairs:
        if not num_open[pair.set_name]:  # the last attempt ended between shard and set
            write_answers(config, pair, _seeds(config))

    def save(name: str, result: ShardResult[str]) -> None:
        pair, seed = place_of[name]
        pair.shards(seed).write(shards[name].name, result.value_of_id, result.num_halved)
        num_open[pair.set_name] -= 1
        if not num_open[pair.set_name]:
            write_answers(config, pair, _seeds(config))

    def quarantine(name: str) -> Quarantine:
        pair, seed = place_of[name]
        return pair.quarantine(config, seed)

    if shards:
        num_rows = sum(len(pair.rows.examples) for pair in pairs) * len(_seeds(config))
        title = f"evaluate {pairs[0].model}"
        work = RowPass(title, "answer", settings, shards, num_rows, save, quarantine)
        answer_rows(config, stop, work)


def _open_shards(config: Config, pair: Pair, seed: int, encoder: Encoder) -> list[WorkShard]:
    """Returns one shard per batch that is not answered: short ones share out best."""
    encoded = [encoder.encode(example) for example in pair.rows.examples]
    references = {example.example_id: () for example in pair.rows.examples}
    batch_size = config.generation.batch_size
    left_out = pair.quarantine(config, seed).unworkable()
    batches = make_batches(encoded, references, batch_size)
    missing = open_batches(batches, set(pair.shards(seed).read()), left_out)
    return [WorkShard(shard.batches, seed) for shard in make_shards(missing, batch_size)]
