"""Step 2: ranking and stages, a pure function of scores, rows and config. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from pocl_dist.config import Config, compare_inputs, select_keys
from pocl_dist.config.steps import needs_difficulty
from pocl_dist.curriculum.stages import make_stages, order
from pocl_dist.data.sources import Rows
from pocl_dist.difficulty.fusion import fuse
from pocl_dist.display.output import show
from pocl_dist.errors import DataError, MismatchError, MissingInputError
from pocl_dist.files import JSONValue, atomic_write_json, digest_of, read_json, sha256_file
from pocl_dist.guards import inside
from pocl_dist.pipeline.difficulty_files import (
    config_inputs,
    read_quarantine,
    read_records,
    write_columns,
    write_records,
)
from pocl_dist.pipeline.inputs import read_train
from pocl_dist.pipeline.progress import say, warn
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.records import DifficultyRecord, Plan, RankedExample, Stage

# A longer ranking would make plan.json unreadable; it goes into a Parquet file beside it.
MAX_RANKING_IN_JSON = 100_000
RANKING_FILE = "plan-ranking.parquet"
_INPUT_KEYS = (
    "curriculum.num_stages",
    "curriculum.epochs_per_stage",
    "curriculum.visits_per_example",
    "curriculum.temperature",
    "curriculum.kd_ratio",
    "curriculum.ordering",
    "engine.global_batch_size",
)


def make_plan(config: Config, run: RunDirectory) -> Plan:
    """Writes `plan.json` and returns the plan; one that is there already and fits is kept as it is.

    Raises MissingInputError (66) without difficulty scores, DataError (65) when they are not those
    of the training rows, MismatchError (78) when scores or plan were made from other inputs.
    """
    rows = read_train(config)
    ranked = _ranked_examples(config, run, rows) if needs_difficulty(config) else None
    inputs = _inputs(config, rows, ranked)
    easy_to_hard = (
        list(rows.by_id()) if ranked is None else [example.example_id for example in ranked]
    )
    stages = make_stages(len(easy_to_hard), config.curriculum, config.engine.global_batch_size)
    if config.models.teacher is None:  # SFT: cross-entropy alone, in every stage
        stages = tuple(replace(stage, temperature=1.0, kd_ratio=0.0) for stage in stages)
    plan = Plan(order(easy_to_hard, config.curriculum.ordering, config.seed), stages)
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
            write_records(run.difficulty / "ranking.parquet", RankedExample, ranked)
        _write_plan(run.plan, plan, inputs)
    _show(plan, config.engine.global_batch_size)
    return plan


def config_keys(config: Config) -> dict[str, JSONValue]:
    """Returns the config keys that the plan depends on."""
    keys = select_keys(config, (*_INPUT_KEYS, "data.limit"))
    keys["models.teacher is null"] = config.models.teacher is None
    if config.curriculum.ordering == "shuffled":
        keys["seed"] = config.seed
    if needs_difficulty(config):
        keys["curriculum.rrf_k"] = config.curriculum.rrf_k
    return keys


def scores_digest(scored: Iterable[DifficultyRecord | RankedExample]) -> str:
    """Returns a digest of the scores, whatever their order."""
    rows: list[JSONValue] = [[row.example_id, row.rouge_l, row.cross_entropy] for row in scored]
    return digest_of(sorted(rows, key=lambda row: str(cast("list[JSONValue]", row)[0])))


def _inputs(
    config: Config, rows: Rows, ranked: Sequence[RankedExample] | None
) -> dict[str, JSONValue]:
    """Returns the config keys and digests that the plan depends on."""
    inputs = config_keys(config) | {"data.train sha256": rows.digest}
    return inputs if ranked is None else inputs | {"difficulty sha256": scores_digest(ranked)}


# --------------------------------------------------------------------------------------- the scores


def _ranked_examples(config: Config, run: RunDirectory, rows: Rows) -> list[RankedExample]:
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
    records = read_records(run.difficulty)
    quarantined = read_quarantine(run.difficulty)
    _check_ids(rows, records, set(quarantined), run.difficulty)
    if quarantined:
        say(f"plan: {len(quarantined)} rows have no finite score and are left out")
    return fuse(records, config.curriculum.rrf_k)


def _check_ids(
    rows: Rows, records: Sequence[DifficultyRecord], quarantined: set[str], folder: Path
) -> None:
    expected = [name for name in rows.by_id() if name not in quarantined]
    scored = {record.example_id for record in records}
    missing = [name for name in expected if name not in scored]
    extra = sorted(scored - set(expected))
    if not scored:
        raise MissingInputError(f"{folder} holds no scores: run `pocl-dist measure` first")
    if missing or extra:
        findings = (
            ("rows of data.train are not scored", missing),
            ("scored rows are not in data.train", extra),
        )
        parts = [
            f"{len(names)} {what} (first: {', '.join(names[:5])})"
            for what, names in findings
            if names
        ]
        raise DataError(f"{folder}: {'; '.join(parts)}; run `pocl-dist measure` to the end")


# -------------------------------------------------------------------------------------- plan.json


def _write_plan(path: Path, plan: Plan, inputs: Mapping[str, JSONValue]) -> None:
    stages = [stage.to_json() for stage in plan.stages]
    ranking: dict[str, object] = {"ranking": list(plan.ranking)}
    if len(plan.ranking) > MAX_RANKING_IN_JSON:
        write_columns(path.with_name(RANKING_FILE), {"example_id": ("str", plan.ranking)})
        ranking = {
            "ranking_file": RANKING_FILE,
            "ranking_sha256": sha256_file(path.with_name(RANKING_FILE)),
            "num_ranked": len(plan.ranking),
        }
    value = {"stages": stages, "inputs": dict(inputs), **ranking}
    atomic_write_json(path, {**value, "digest": digest_of(cast("JSONValue", value))})


def _read_ranking(path: Path, value: Mapping[str, JSONValue]) -> tuple[str, ...]:
    if "ranking" in value:
        return tuple(map(str, cast("list[JSONValue]", value["ranking"])))
    import pyarrow.parquet as pq

    file = inside(path.parent, str(value["ranking_file"]), f"{path}: ranking_file")
    if not file.exists():
        raise MissingInputError(f"{path}: its ranking_file {file} is missing")
    if sha256_file(file) != value["ranking_sha256"]:
        raise MismatchError(f"{file} was changed after the plan was made (sha256 differs)")
    return tuple(pq.read_table(file).column("example_id").to_pylist())


def read_plan(path: Path) -> Plan:
    """Returns the plan in `plan.json`.

    Raises MissingInputError (66) without one, MismatchError (78) when it was
    changed after it was made.
    """
    if not path.exists():
        raise MissingInputError(f"{path} does not exist: run `pocl-dist plan` first")
    try:
        value = read_json(path)
        digest = value.pop("digest")
        if digest_of(value) != digest:
            raise MismatchError(
                f"{path} was changed after it was made (its digest differs); plan again"
            )
        stages = tuple(
            Stage.from_json(stage) for stage in cast("list[dict[str, object]]", value["stages"])
        )
        ranking = _read_ranking(path, value)
    except (KeyError, TypeError, ValueError) as error:
        raise MismatchError(f"{path} is not a plan: {error!r}") from error
    return Plan(ranking, stages)


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
