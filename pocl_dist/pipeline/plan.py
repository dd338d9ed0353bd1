"""Step 2: ranking and stages, a pure function of scores, rows and config. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from pocl_dist.config import Config, compare_inputs, select_keys
from pocl_dist.config.steps import needs_difficulty
from pocl_dist.curriculum.stages import make_stages, order
from pocl_dist.data.columns import TextColumn, number_array, take, write_columns
from pocl_dist.data.sources import Rows
from pocl_dist.difficulty.fusion import Fused, fuse
from pocl_dist.difficulty.signals import SIGNALS
from pocl_dist.display.output import say, show, warn
from pocl_dist.errors import ConfigError, MismatchError, MissingInputError
from pocl_dist.files import JSONValue, read_json
from pocl_dist.pipeline import plan_files
from pocl_dist.pipeline.difficulty_files import config_inputs, read_quarantine
from pocl_dist.pipeline.inputs import read_train
from pocl_dist.pipeline.plan_files import read_plan, write_plan
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.pipeline.scores import Scores, read_scores, rows_of_scores
from pocl_dist.records import Plan, Stage

if TYPE_CHECKING:
    import pyarrow as pa

_INPUT_KEYS = (
    "curriculum.num_stages",
    "curriculum.epochs_per_stage",
    "curriculum.visits_per_example",
    "curriculum.temperature",
    "curriculum.kd_ratio",
    "curriculum.ordering",
    "engine.global_batch_size",
)


@dataclass(frozen=True)
class _Ranked:
    """The scores in the order of ids, what they make of the rows, and the rows' places."""

    scores: Scores
    fused: Fused
    rows: np.ndarray


def make_plan(config: Config, run: RunDirectory) -> Plan:
    """Writes `plan.json` and returns the plan; one that is there already and fits is kept as it is.

    Raises MissingInputError (66) without difficulty scores, DataError (65) when they are not those
    of the training rows, MismatchError (78) when scores or plan were made from other inputs.
    """
    rows = read_train(config)
    ranked = _rank(config, run, rows) if needs_difficulty(config) else None
    inputs = _inputs(config, rows, ranked)
    num_ranked = len(rows.examples) if ranked is None else len(ranked.rows)
    stages = make_stages(num_ranked, config.curriculum, config.engine.global_batch_size)
    _check_restarts(config, stages)
    if config.models.teacher is None:  # SFT: cross-entropy alone, in every stage
        stages = tuple(replace(stage, temperature=1.0, kd_ratio=0.0) for stage in stages)
    places = order(num_ranked, config.curriculum.ordering, config.seed)
    if ranked is None:
        ids, in_order = take(rows.ids(), places), places
    else:
        by_id = ranked.fused.easy_to_hard[places]
        ids, in_order = take(ranked.scores.ids, by_id), ranked.rows[by_id]
    is_long = num_ranked > plan_files.MAX_RANKING_IN_JSON
    plan = Plan(TextColumn(ids) if is_long else tuple(TextColumn(ids)), stages)
    if run.plan.exists():
        kept = read_plan(run.plan)
        compare_inputs(
            cast("Mapping[str, JSONValue]", read_json(run.plan)["inputs"]), inputs, run.plan
        )
        if kept != plan:
            raise MismatchError(
                f"{run.plan}: this version plans otherwise from the same inputs; remove it"
            )
    else:
        if ranked is not None:
            _write_ranking(run.difficulty / "ranking.parquet", ranked)
        write_plan(run.plan, plan, in_order, inputs)
    _show(plan, config.engine.global_batch_size)
    return plan


def _check_restarts(config: Config, stages: Sequence[Stage]) -> None:
    late = [step for step in config.optimizer.restart_steps if step >= stages[0].num_steps]
    if late:
        raise ConfigError(
            f"optimizer.restart_steps: {late} are not reached: the stage has "
            f"{stages[0].num_steps} steps"
        )


def config_keys(config: Config) -> dict[str, JSONValue]:
    """Returns the config keys that the plan depends on."""
    keys = select_keys(config, (*_INPUT_KEYS, "data.limit"))
    keys["models.teacher is null"] = config.models.teacher is None
    if config.curriculum.ordering == "shuffled":
        keys["seed"] = config.seed
    if needs_difficulty(config):
        keys["curriculum.rrf_k"] = config.curriculum.rrf_k
    return keys


def _inputs(config: Config, rows: Rows, ranked: _Ranked | None) -> dict[str, JSONValue]:
    """Returns the config keys and digests that the plan depends on."""
    inputs = config_keys(config) | {"data.train sha256": rows.digest}
    return inputs if ranked is None else inputs | {"difficulty sha256": ranked.scores.digest()}


# --------------------------------------------------------------------------------------- the scores


def _rank(config: Config, run: RunDirectory, rows: Rows) -> _Ranked:
    """Returns the training rows ranked, easy to hard; rows without a finite score are left out."""
    record_of_inputs = run.difficulty / "inputs.json"
    if not record_of_inputs.exists():
        raise MissingInputError(f"{run.difficulty} holds no scores: run `pocl-dist measure` first")
    # The models' digests are measure's to compare: hashing gigabytes is no part of planning.
    expected = config_inputs(config, rows)
    found = read_json(record_of_inputs)
    compare_inputs(
        {key: value for key, value in found.items() if " model " not in key},
        expected,
        run.difficulty,
    )
    scores = read_scores(run.difficulty)
    rows_of_ids = rows_of_scores(scores, rows, run.difficulty)
    num_quarantined = len(read_quarantine(run.difficulty))
    if num_quarantined:
        say(f"plan: {num_quarantined} rows have no finite score and are left out")
    fused = fuse(scores.columns, config.curriculum.rrf_k)
    return _Ranked(scores, fused, rows_of_ids)


def _write_ranking(path: Path, ranked: _Ranked) -> None:
    """Writes what the ranking comes from, easy to hard: scores, ranks (from 1), fused score."""
    scores, fused = ranked.scores, ranked.fused

    def columns_of(part: slice) -> dict[str, pa.Array]:
        places = fused.easy_to_hard[part]
        return {
            "example_id": take(scores.ids, places),
            **{name: number_array(scores.columns[name][places]) for name in SIGNALS},
            **{f"rank_{name}": number_array(fused.ranks[name][places]) for name in SIGNALS},
            "fused_score": number_array(fused.fused_score[places]),
        }

    write_columns(path, len(fused.easy_to_hard), columns_of)


# ------------------------------------------------------------------------------------------ display


def _show(plan: Plan, global_batch_size: int) -> None:
    from rich.table import Table

    table = Table(title=f"{len(plan.ranking)} rows in {len(plan.stages)} stages")
    for column in ("stage", "rows", "temperature", "kd_ratio", "epochs", "steps", "visits"):
        table.add_column(column, justify="right")
    for stage in plan.stages:
        visits = stage.num_examples * stage.epochs
        table.add_row(
            str(stage.index + 1),  # people count from 1; files hold the index
            str(stage.num_examples),
            f"{stage.temperature:.3f}",
            f"{stage.kd_ratio:.3f}",
            f"{stage.epochs:g}",
            str(stage.num_steps),
            f"{visits:.0f}",
        )
    show(table)
    visits_per_row = sum(stage.num_examples * stage.epochs for stage in plan.stages) / len(
        plan.ranking
    )
    say(
        f"plan: {visits_per_row:.2f} visits per row, "
        f"{sum(stage.num_steps for stage in plan.stages)} steps"
    )
    for stage in plan.stages:
        if stage.num_examples < global_batch_size:
            warn(
                f"stage {stage.index + 1} has {stage.num_examples} rows, "
                "less than engine.global_batch_size "
                f"{global_batch_size}: a batch spans several epochs"
            )
