"""All of one run that its page shows: read from the run's files, bounded in size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from pocl_dist.config import Config
from pocl_dist.data.sources import read_rows
from pocl_dist.errors import PoclError
from pocl_dist.files import JSONValue, read_json_lines
from pocl_dist.pipeline.difficulty_files import read_records
from pocl_dist.pipeline.generated_files import output_file
from pocl_dist.pipeline.inputs import read_prompts
from pocl_dist.pipeline.plan_files import read_plan
from pocl_dist.pipeline.report_page.answers import Case, training_cases
from pocl_dist.pipeline.report_page.answers import test_cases as cases_of_tests
from pocl_dist.pipeline.report_page.findings import (
    Finding,
    missing_parts,
    mixed_parts,
    progress_finding,
)
from pocl_dist.pipeline.report_page.ranking import Ranking, read_ranking
from pocl_dist.pipeline.report_page.series import Row
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.records import Stage

MAX_ROWS_READ = 100_000
"""Training rows that are looked through for the sample of answers; prompts lie in `data.train`."""
_SHARE_OF_TRAINING = 4  # of the answers, one in so many is of a training row


@dataclass
class Material:
    """What was found of a run; parts that are not there are None or empty."""

    config: Config
    run: RunDirectory
    numbers: dict[str, JSONValue]  # those of report.json
    metrics: Sequence[Row]
    stages: tuple[Stage, ...] = ()
    ranking: Ranking | None = None
    cases: list[Case] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def gather(config: Config, run: RunDirectory, numbers: dict[str, JSONValue]) -> Material:
    """Returns what the run holds; what is missing, unfinished or mixed is among the findings."""
    found = Material(config, run, numbers, read_json_lines(run.metrics))
    _read_plan(found)
    last = next((row for row in reversed(found.metrics) if row["kind"] == "step"), None)
    if last is not None:
        place = (int(cast("int", last["step"])), int(cast("int", last["stage"])))
        found.findings += progress_finding(run, list(found.stages), *place)
    found.findings += mixed_parts(config, run)
    found.findings += missing_parts(config, run, numbers)
    if config.report.answers:
        found.cases = _cases(found)
    return found


def _read_plan(found: Material) -> None:
    """Reads the plan's stages and a part of the ranking."""
    try:
        found.stages = read_plan(found.run.plan).stages
    except PoclError as error:
        kind = "mixed" if found.run.plan.exists() else "missing"
        remedy = "run `pocl-dist plan`"
        found.findings.append(Finding(kind, "training", f"no plan: {error}", remedy))
    file = found.run.difficulty / "ranking.parquet"
    if file.exists():
        ordering = found.config.curriculum.ordering
        stages = () if ordering == "shuffled" else found.stages
        found.ranking = read_ranking(file, stages, ordering == "reversed")


def _cases(found: Material) -> list[Case]:
    """Returns sampled answers: of the test sets, and of training rows where they were measured."""
    limit = found.config.report.answers
    has_tests = bool(found.numbers["eval"])
    share = limit // _SHARE_OF_TRAINING if has_tests else limit
    try:
        of_training = _training_cases(found, share)
    except PoclError as error:  # rows or scores that are gone or changed: the rest is shown
        of_training = []
        text = f"no answers to training rows: {error}"
        remedy = "`pocl-dist verify` tells what was changed"
        found.findings.append(Finding("missing", "answers", text, remedy))
    of_tests = cases_of_tests(found.config, found.run, limit - len(of_training))
    return of_tests + of_training


def _training_cases(found: Material, limit: int) -> list[Case]:
    ranking = found.ranking
    if ranking is None or not limit:
        return []
    if ranking.num_rows > MAX_ROWS_READ:
        text = f"training rows are not looked through: more than {MAX_ROWS_READ:,}"
        remedy = "their answers lie in difficulty/"
        found.findings.append(Finding("missing", "answers", text, remedy))
        return []
    records = read_records(found.run.difficulty)
    file = output_file(found.config)
    is_generated = found.config.data.responses == "teacher" and file.exists()
    said = read_rows(str(file), "data.responses").examples if is_generated else []
    generated = {example.example_id: example.references[0] for example in said}
    rows = read_prompts(found.config)
    return training_cases(rows, records, generated, limit, found.config.seed)
