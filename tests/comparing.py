"""Comparisons whose runs are written here, not trained: every file as the steps would leave it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pocl_dist.config import Config, load_config, replaced
from pocl_dist.files import atomic_write_json, atomic_write_text
from pocl_dist.models.sources import MARKER
from pocl_dist.pipeline import difficulty_files, evaluate, generated_files
from pocl_dist.pipeline.compare import prepare
from pocl_dist.pipeline.comparison.folders import ComparedRun
from pocl_dist.pipeline.comparison.rates import grid_of
from pocl_dist.pipeline.comparison.request import CompareRequest
from pocl_dist.pipeline.comparison.rounds import Comparison
from pocl_dist.pipeline.comparison.shared import link_shared, shared_config
from pocl_dist.pipeline.inputs import finished_record, read_eval_sets, read_prompts, read_train
from pocl_dist.pipeline.manifest import write_manifest
from pocl_dist.pipeline.plan import make_plan
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.records import DifficultyRecord
from tests.tiny import write_config, write_rows

NUM_ROWS = 24


def write_model(folder: Path, weights: bytes = b"weights") -> Path:
    """Writes a folder that has a digest as a model has."""
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        atomic_write_json(folder / name, {})
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def base_config(folder: Path, num_sets: int = 1, **sections: object) -> Config:
    """Returns the config of a comparison over 24 rows, four stages and `num_sets` test sets."""
    teacher = write_model(folder / "teacher", b"teacher")
    student = write_model(folder / "student")
    rows = write_rows(folder / "train.jsonl", NUM_ROWS)
    dev = write_rows(folder / "dev.jsonl", 3)
    tests = [str(write_rows(folder / f"test{i}.jsonl", 3 + i)) for i in range(1, num_sets + 1)]
    curriculum = {"num_stages": 4, "visits_per_example": 5, "ordering": "curriculum"}
    given = {key: value for key, value in sections.items() if key != "curriculum"}
    extra = sections.get("curriculum", {})
    assert isinstance(extra, dict)
    path = write_config(
        folder, teacher, student, rows,
        data={"dev": str(dev), "eval": tests}, curriculum={**curriculum, **extra}, **given,
    )  # fmt: skip
    return load_config([path])


def make_shared_files(base: Config, num_without_score: int = 0) -> RunDirectory:
    """Writes RUN/shared as measure, generate and plan would."""
    config = shared_config(base)
    run = RunDirectory(Path(config.run_dir))
    run.write_config(config)
    rows = read_prompts(config)
    inputs = generated_files.config_inputs(config) | {"data.train sha256": rows.digest}
    answers = {row.example_id: row.references[0] for row in rows.examples}
    generated_files.write_data_set(config, run, rows.examples, answers, inputs, {})
    atomic_write_json(run.generated / "inputs.json", inputs)
    scored = difficulty_files.config_inputs(config, read_train(config))
    atomic_write_json(run.difficulty / "inputs.json", scored)
    records = [
        DifficultyRecord(row.example_id, index / NUM_ROWS, NUM_ROWS - index, 3, "cat")
        for index, row in enumerate(rows.examples)
    ]
    lost, kept = records[:num_without_score], records[num_without_score:]
    failures = [{"example_id": r.example_id, "cause": "lost", "reason": "gone"} for r in lost]
    if failures:
        text = "".join(json.dumps(row) + "\n" for row in failures)
        atomic_write_text(run.difficulty / "quarantine.jsonl", text)
    difficulty_files.write_difficulty(run.difficulty, "shard-00000", kept, 0)
    atomic_write_json(run.difficulty / "summary.json", {"num_examples": len(kept)})
    make_plan(config, run)
    write_manifest(run.root)
    run.write_status("done", 0, "plan")
    return run


def comparison_of(base: Config, request: CompareRequest) -> Comparison:
    """Returns a comparison whose shared files are there."""
    return prepare(base, request, grid_of(base, request.lr_grid))


def plan_run(comparison: Comparison, compared: ComparedRun) -> RunDirectory:
    """Writes what a training has before its first step."""
    run = compared.run
    link_shared(comparison.base, compared, comparison.counts)
    run.write_config(compared.config)
    make_plan(compared.config, run)
    return run


def train_run(
    comparison: Comparison, compared: ComparedRun, dev: Sequence[float] = ()
) -> RunDirectory:
    """Writes what a finished training leaves that the table reads: export's record, dev metrics."""
    run = plan_run(comparison, compared)
    rows = [{"kind": "dev", "step": i, "stage": 0, "value": value} for i, value in enumerate(dev)]
    atomic_write_text(run.metrics, "".join(json.dumps(row) + "\n" for row in rows))
    atomic_write_json(run.export / MARKER, finished_record(compared.config, run))
    write_manifest(run.root)
    run.write_status("done", 0, "report")
    comparison.forget(compared)
    return run


def answer_run(
    comparison: Comparison,
    compared: ComparedRun,
    scores: Mapping[str, Sequence[float]],
    dev: Sequence[float] = (),
) -> RunDirectory:
    """Writes a run that is done: {test set: ROUGE-L of each example, 0..1}; exact match is 0."""
    run = train_run(comparison, compared, dev)
    models = ["answers", *(f"answers-{m}" for m in ("teacher", "student_before"))]
    for name, rows in read_eval_sets(compared.config).items():
        for stem in models if compared.config.evaluate.baselines else models[:1]:
            lines = [
                {"id": row.example_id, "seed": 10, "rouge_l": score, "exact_match": 0.0}
                for row, score in zip(rows.examples, scores[name], strict=True)
            ]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            atomic_write_text(run.eval / name / f"{stem}.jsonl", text)
        inputs = evaluate.config_keys(compared.config) | {f"data.eval {name} sha256": rows.digest}
        atomic_write_json(run.eval / name / "inputs.json", inputs)
        atomic_write_json(run.eval / name / "report.json", {})
    write_manifest(run.root)
    comparison.forget(compared)
    return run


def chosen(comparison: Comparison, arm_name: str, seed: int) -> ComparedRun:
    """Returns a run of an arm at the first learning rate of the grid."""
    arm = next(arm for arm in comparison.arms if arm.name == arm_name)
    return comparison.compared(arm, comparison.grid[0], seed)


def with_keys(compared: ComparedRun, **keys: object) -> ComparedRun:
    """Returns the run with other values under keys, `__` for the dot."""
    dotted = {key.replace("__", "."): value for key, value in keys.items()}
    return ComparedRun(compared.key, replaced(compared.config, dotted))  # type: ignore[arg-type]
