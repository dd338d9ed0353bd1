"""comparison.json: everything that the comparison found, a pure function of the runs' files.

docs/compare.md describes each field. A run that is missing, half-finished, failed or mixed is named
with its reason and left out; figures over fewer seeds than asked for are marked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

from pocl_dist.files import JSONValue, digest_of, read_json, sha256_file
from pocl_dist.pipeline.comparison import rates
from pocl_dist.pipeline.comparison.arms import Arm
from pocl_dist.pipeline.comparison.differences import differences
from pocl_dist.pipeline.comparison.folders import ComparedRun
from pocl_dist.pipeline.comparison.intervals import (
    BOOTSTRAP_SEED,
    CONFIDENCE,
    NUM_RESAMPLES,
    spread,
)
from pocl_dist.pipeline.comparison.rounds import Comparison
from pocl_dist.pipeline.comparison.scores import (
    METRICS,
    ScoresOfArm,
    SetScores,
    columns_of,
    read_scores,
    run_scores,
)
from pocl_dist.pipeline.comparison.visits import stages_of, visits_of
from pocl_dist.versions import versions

FORMAT = 1


def tabulate(comparison: Comparison, request: Mapping[str, JSONValue]) -> dict[str, JSONValue]:
    """Returns the content of comparison.json; its `digest` is over all other fields."""
    sets = list(comparison.inputs.tests)
    scores = {arm.name: _scores_of(comparison, arm, sets) for arm in comparison.arms}
    arms = [_arm_row(comparison, arm, scores[arm.name], sets) for arm in comparison.arms]
    dev = {"metric": comparison.base.dev.metric} if comparison.base.data.dev else None
    value: dict[str, JSONValue] = {
        "format": FORMAT,
        "request": dict(request),
        "grid": list(comparison.grid),
        "dev": cast("JSONValue", dev),
        "test_sets": cast("JSONValue", _set_sizes(scores, sets)),
        "target_visits": comparison.target_visits,
        "bootstrap": {
            "kind": "percentile, paired over examples",
            "confidence": CONFIDENCE,
            "num_resamples": NUM_RESAMPLES,
            "seed": BOOTSTRAP_SEED,
        },
        "baselines": cast("JSONValue", _baselines(comparison, sets)),
        "arms": cast("JSONValue", arms),
        "differences": cast("JSONValue", differences(comparison, scores, sets)),
        "ablations": [asdict(row) for row in comparison.ablations],
        "marks": [mark for row in arms for mark in cast("list[JSONValue]", row["marks"])],
        "is_complete": all(row["is_complete"] for row in arms),
        "versions": versions(),
    }
    return {**value, "digest": digest_of(value)}


def _scores_of(comparison: Comparison, arm: Arm, sets: Sequence[str]) -> ScoresOfArm:
    """Returns the scores of the arm's finished runs."""
    rate = comparison.chosen_rate(arm)
    if rate is None:
        return {}
    runs = {seed: comparison.compared(arm, rate, seed) for seed in comparison.seeds}
    return {
        seed: run_scores(compared.run, sets)
        for seed, compared in runs.items()
        if comparison.look(compared).state == "done"
    }


def _set_sizes(scores: Mapping[str, ScoresOfArm], sets: Sequence[str]) -> dict[str, object]:
    sizes: dict[str, object] = {name: {"num_examples": None} for name in sets}
    for of_arm in scores.values():
        for of_seed in of_arm.values():
            for name, found in of_seed.items():
                sizes[name] = {"num_examples": found.num_examples}
    return sizes


def _figures(of_arm: ScoresOfArm, sets: Sequence[str]) -> dict[str, object]:
    """Returns {column: {metric: mean, std, num_seeds}}; empty without a finished run."""
    if not of_arm:
        return {}
    found: dict[str, object] = {}
    for column, names in columns_of(sets).items():
        found[column] = {
            metric: asdict(
                spread(
                    [
                        sum(of_seed[name].mean(metric) for name in names) / len(names)
                        for of_seed in of_arm.values()
                    ]
                )
            )
            for metric in METRICS
        }
    return found


# -------------------------------------------------------------------------------------------- arms


def _arm_row(
    comparison: Comparison, arm: Arm, of_arm: ScoresOfArm, sets: Sequence[str]
) -> dict[str, JSONValue]:
    config = arm.config(comparison.base)
    num_rows = comparison.counts.of(config)
    stages = stages_of(config, num_rows)
    rate, candidates = comparison.chosen_rate(arm), comparison.candidates(arm)
    runs = [
        _run_row(comparison, comparison.compared(arm, rate, seed), of_arm.get(seed))
        for seed in comparison.seeds
        if rate is not None
    ]
    marks = _open_runs(arm, runs)
    if rate is None:
        marks.append(f"{arm.name}: no learning rate is chosen: {_why_none(candidates)}")
    if len(candidates) > 1:
        marks += [
            f"{arm.name}, learning rate {c.learning_rate!r}: {c.look.state}: {c.look.reason}"
            for c in candidates
            if c.dev is None and rate is not None and c.learning_rate != rate
        ]
    row = {
        "name": arm.name,
        "kind": arm.kind,
        "method": arm.method,
        "keys": dict(arm.keys),
        "num_rows": num_rows,
        "visits": visits_of(stages),
        "visits_per_row": visits_of(stages) / num_rows,
        "num_steps": sum(stage.num_steps for stage in stages),
        "stages": [stage.to_json() for stage in stages],
        "learning_rate": rates.to_json(candidates, comparison.seeds[0], rate),
        "runs": runs,
        "results": _figures(of_arm, sets),
        "num_seeds": len(of_arm),
        "is_complete": len(of_arm) == len(comparison.seeds) and rates.is_settled(candidates),
        "marks": marks,
    }
    return cast("dict[str, JSONValue]", row)


def _open_runs(arm: Arm, runs: Sequence[Mapping[str, object]]) -> list[str]:
    """Returns a line for each cause that keeps seeds of an arm out of the table."""
    seeds: dict[str, list[str]] = {}
    for row in runs:
        if row["state"] != "done":
            seeds.setdefault(f"{row['state']}: {row['reason']}", []).append(str(row["seed"]))
    return [
        f"{arm.name}, seed{'s' if len(of_cause) > 1 else ''} {', '.join(of_cause)}: {cause}"
        for cause, of_cause in seeds.items()
    ]


def _why_none(candidates: Sequence[rates.Candidate]) -> str:
    return "; ".join(f"{c.learning_rate!r} {c.look.state} ({c.look.reason})" for c in candidates)


def _run_row(
    comparison: Comparison, compared: ComparedRun, scores: Mapping[str, SetScores] | None
) -> dict[str, object]:
    seen, run = comparison.look(compared), compared.run
    is_done = scores is not None
    timings = read_json(run.timings) if is_done and run.timings.exists() else {}
    return {
        "run": compared.key.name,
        "seed": compared.key.seed,
        "learning_rate": compared.key.learning_rate,
        "state": seen.state,
        "reason": seen.reason,
        "exit_code": seen.exit_code,
        "dev": rates.dev_of(compared) if is_done else None,
        "scores": {
            name: {metric: found.mean(metric) for metric in METRICS}
            for name, found in (scores or {}).items()
        },
        "seconds": timings,
        "manifest_sha256": sha256_file(run.root / "manifest.json") if is_done else None,
    }


def _baselines(comparison: Comparison, sets: Sequence[str]) -> dict[str, object]:
    """Returns the scores of teacher and untrained student, from the run that answered for them."""
    arm, seed = comparison.arms[0], comparison.seeds[0]
    rate = comparison.chosen_rate(arm)
    if rate is None or comparison.look(comparison.compared(arm, rate, seed)).state != "done":
        return {}
    folder = comparison.compared(arm, rate, seed).run.eval
    return {
        model: _figures({seed: _answers_of(folder, model, sets)}, sets)
        for model in ("teacher", "student_before")
    }


def _answers_of(folder: Path, model: str, sets: Sequence[str]) -> dict[str, SetScores]:
    return {name: read_scores(folder / name / f"answers-{model}.jsonl") for name in sets}
