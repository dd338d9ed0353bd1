"""Run directories for the report, written here instead of trained: whole, or half of one."""

from __future__ import annotations

import json
import random
from pathlib import Path

from pocl_dist.config import Config, load_config
from pocl_dist.files import atomic_write_json
from pocl_dist.pipeline import difficulty_files
from pocl_dist.pipeline.eval_report import write_reports
from pocl_dist.pipeline.inputs import read_train
from pocl_dist.pipeline.plan import make_plan
from pocl_dist.pipeline.plan_files import read_plan
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.records import DifficultyRecord
from tests.tiny import write_config, write_rows

NASTY = '</script><script>alert("x")</script><img src=x onerror=alert(1)> & \u2028 {{ 7 * 7 }}'


def write_run(folder: Path, num_rows: int = 24, **sections: dict) -> tuple[Config, RunDirectory]:
    """Writes a run that is measured and planned: 4 stages over `num_rows` rows."""
    folder.mkdir(exist_ok=True)
    rows = write_rows(folder / "train.jsonl", num_rows)
    defaults: dict[str, dict] = {
        "curriculum": {"num_stages": 4, "epochs_per_stage": 4, "ordering": "curriculum"},
        "data": {"dev": str(rows), "eval": [str(rows)]},
        "dev": {"quarter_rows": 3},
        "evaluate": {"baselines": True},
    }
    merged = {name: {**keys, **sections.pop(name, {})} for name, keys in defaults.items()}
    teacher, student = folder / "teacher", folder / "student"
    config = load_config([write_config(folder, teacher, student, rows, **merged, **sections)])
    run = RunDirectory(Path(config.run_dir))
    run.write_config(config)
    train = read_train(config)
    atomic_write_json(run.difficulty / "inputs.json", difficulty_files.config_inputs(config, train))
    draw = random.Random(1)
    records = [
        DifficultyRecord(row.example_id, draw.random(), 4 * draw.random(), 5, NASTY)
        for row in train.examples
    ]
    difficulty_files.write_difficulty(run.difficulty, "shard-00000", records, 0)
    make_plan(config, run)
    run.add_seconds("measure", 12.5)
    run.add_seconds("plan", 0.5)
    return config, run


def write_metrics(run: RunDirectory, last_step: int | None = None) -> list[dict]:
    """Writes metrics.jsonl as training would, up to a step; returns its lines."""
    rows: list[dict] = []
    step, draw = 0, random.Random(2)
    for stage in read_plan(run.plan).stages:
        rows.append({"kind": "stage", "step": step + 1, "stage": stage.index})
        if step == 0:
            rows += _evaluations(0, 0, draw)
        for step_in_stage in range(stage.num_steps):
            step += 1
            if last_step is not None and step > last_step:
                break
            kd_loss, ce_loss = 3 + draw.random(), 2 + draw.random()
            rows.append(
                {
                    "kind": "step",
                    "step": step,
                    "stage": stage.index,
                    "epoch": step_in_stage // 3,
                    "loss": (kd_loss + ce_loss) / 2,
                    "kd_loss": kd_loss,
                    "ce_loss": ce_loss,
                    "kl": kd_loss / 3,
                    "temperature": stage.temperature,
                    "kd_ratio": stage.kd_ratio,
                    "learning_rate": 1e-3 / (1 + step_in_stage),
                    "grad_norm": draw.random(),
                    "num_tokens": 40,
                    "padding_share": 0.1,
                    "tokens_per_second": 900 + draw.random(),
                    "peak_memory_bytes": 2**29 + step,
                }
            )
        else:
            rows += _evaluations(step, stage.index, draw)
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run.add_seconds("distill", 100.0)
    return rows


def _evaluations(step: int, stage: int, draw: random.Random) -> list[dict]:
    place = {"step": step, "stage": stage}
    scores = {
        name: [draw.random() for _ in range(4)] for name in ("rouge_l", "cross_entropy", "kl")
    }
    return [
        {"kind": "dev", **place, "metric": "rouge_l", "value": draw.random(), "seconds": 1.0},
        {"kind": "quarters", **place, "num_rows": [3, 3, 3, 3], **scores, "seconds": 1.0},
    ]


def write_eval(run: RunDirectory, num_rows: int = 24, *, has_baselines: bool = True) -> None:
    """Writes the answers of a test set, and its report."""
    models = ["student", *(["teacher", "student_before"] if has_baselines else [])]
    folder = run.eval / "train"
    folder.mkdir(parents=True, exist_ok=True)
    for number, model in enumerate(models):
        name = "" if model == "student" else f"-{model}"
        rows = [
            {
                "id": f"test-{index}", "seed": 10, "prompt": f"prompt {index} {NASTY}",
                "context": "", "references": ["yes", "no"], "answer": f"{model} {index} {NASTY}",
                "rouge_l": ((index + number) % 7) / 7, "exact_match": float(index % 2),
            }
            for index in range(num_rows)
        ]  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"answers{name}.jsonl").write_text(text)
        passes = {"num_failed_answers": 0, "num_halved_batches": 0}
        atomic_write_json(folder / f"passes{name}.json", passes)
    write_reports(run.eval, ["train"], models, "0" * 64)


def write_whole_run(folder: Path, num_rows: int = 24) -> tuple[Config, RunDirectory]:
    """Writes a run in which every part of the report is there."""
    config, run = write_run(folder, num_rows)
    write_metrics(run)
    write_eval(run, num_rows)
    (run.export).mkdir()
    (run.export / "config.json").write_text("{}")
    return config, run


def _difference(arm: str, metric: str, mean: float, test_set: str) -> dict[str, object]:
    return {
        "arm": f"{arm}-pocl", "against": f"{arm}-kd", "metric": metric, "test_set": test_set,
        "mean": mean, "std": 0.5, "low": mean - 1, "high": mean + 1, "num_seeds": 2,
        "is_complete": True, "by_seed": {"1": mean, "2": mean},
    }  # fmt: skip


COMPARISON: dict = {
    "test_sets": {"a": {"num_examples": 9}, "b": {"num_examples": 9}},
    "bootstrap": {"confidence": 0.95},
    "marks": [f"reverse_kl-kd, seed 2: failed: {NASTY}"],
    "versions": {"pocl_dist": "0.1.0"},
    "differences": [
        _difference(arm, metric, mean, test_set)
        for arm, mean in (("forward_kl", 0.4), ("reverse_kl", -2.5))
        for metric in ("rouge_l", "exact_match")
        for test_set in ("a", "b", "average")
    ],
}
"""What the page takes of a comparison.json; of a pair without a common seed too."""
COMPARISON["differences"].append(
    _difference("none", "rouge_l", 0.0, "average") | {"mean": None, "low": None, "high": None}
)
TABLES = {
    "ROUGE-L": [["method", "arm", "a", "b", "average"],
                ["forward_kl", "KD", "61.20 ± 0.51", "60.00 ± 0.20", "60.60 ± 0.30"],
                ["", "KD + POCL", NASTY, "61.00 ± 0.20", "61.00 ± 0.30"]],
}  # fmt: skip
