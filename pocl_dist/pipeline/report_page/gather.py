"""All of one run that its page shows: read from the run's files, bounded in size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from pocl_dist.config import Config, dump_config
from pocl_dist.data.sources import read_rows
from pocl_dist.errors import PoclError
from pocl_dist.files import JSONValue, read_json_lines
from pocl_dist.pipeline.difficulty_files import read_records
from pocl_dist.pipeline.generated_files import output_file
from pocl_dist.pipeline.inputs import read_prompts
from pocl_dist.pipeline.plan import read_plan
from pocl_dist.pipeline.report_page import charts, facts
from pocl_dist.pipeline.report_page.answers import (
    MODELS,
    Case,
    shortened,
    training_cases,
)
from pocl_dist.pipeline.report_page.answers import test_cases as cases_of_tests
from pocl_dist.pipeline.report_page.findings import (
    Finding,
    missing_parts,
    mixed_parts,
    progress_finding,
)
from pocl_dist.pipeline.report_page.page import Page
from pocl_dist.pipeline.report_page.ranking import Ranking, read_ranking
from pocl_dist.pipeline.report_page.series import Columns, Row, Series, make_series, stage_name
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


# ------------------------------------------------------------------------------------------ the page


def run_page(found: Material) -> Page:
    """Returns the page of a run."""
    quarters = cast("Sequence[Row]", found.numbers["quarters"])
    series = make_series(found.metrics, quarters)
    specs, datasets = _charts(found, series)
    values = {
        "title": f"{Path(found.config.run_dir).name} · pocl_dist report",
        "name": Path(found.config.run_dir).name,
        "method": facts.method(found.config),
        **_model_names(found.config),
        "is_incomplete": any(finding.kind != "missing" for finding in found.findings),
        "findings": found.findings,
        "headlines": facts.headlines(found.numbers, found.metrics, found.stages),
        "tests": facts.test_table(cast("Mapping[str, Row]", found.numbers["eval"])),
        "stages": _stage_table(found),
        "quarter_rows": max(cast("list[int]", quarters[0]["num_rows"])) if quarters else 0,
        "thinned": _thinned(series, found.ranking),
        "provenance": facts.provenance(found.config, found.run),
        "config": dump_config(found.config),
        **_answers(found),
    }
    return Page("report.html", values, specs, datasets)


def _model_names(config: Config) -> dict[str, str]:
    teacher, student = config.models.teacher, config.models.student
    layers = f"{len(student.init_layers or ())} layers of the teacher"
    return {
        "teacher": "no teacher" if teacher is None else Path(teacher.path).name,
        "student": layers if student.path is None else Path(student.path).name,
    }


def _stage_table(found: Material) -> list[dict[str, str]]:
    trained = {
        int(cast("int", row["stage"])): row
        for row in cast("Sequence[Row]", found.numbers["stages"])
    }
    table = []
    for stage in found.stages:
        row = trained.get(stage.index, {})
        done = int(cast("int", row.get("num_steps", 0)))
        steps = f"{done:,}" if done == stage.num_steps else f"{done:,} of {stage.num_steps:,}"
        figures = {
            "first": _figure(row.get("first_epoch_loss"), 4),
            "last": _figure(row.get("last_epoch_loss"), 4),
            "dev": _figure(row.get("dev"), 2),
        }
        table.append(
            {
                "stage": stage_name(stage.index),
                "num_examples": f"{stage.num_examples:,}",
                "temperature": f"{stage.temperature:.2f}",
                "kd_ratio": f"{stage.kd_ratio:.2f}",
                "num_steps": steps,
                **figures,
            }
        )
    return table


def _figure(value: JSONValue, digits: int) -> str:
    return "–" if value is None else f"{float(cast('float', value)):.{digits}f}"


def _thinned(series: Series, ranking: Ranking | None) -> dict[str, str]:
    """Returns what is said of charts that do not draw everything."""
    said = {"steps": "", "ranking": ""}
    if series.num_drawn < series.num_steps:
        said["steps"] = (
            f"{series.num_drawn:,} of {series.num_steps:,} steps are drawn: ends, extremes, and "
            "least and greatest loss of neighbours; means are over all steps."
        )
    if ranking is not None:
        drawn = len(ranking.points["place"])
        evenly = "" if drawn == ranking.num_rows else ", evenly taken from the ranking"
        said["ranking"] = f"{drawn:,} of {ranking.num_rows:,} rows are drawn{evenly}."
    return said


def _answers(found: Material) -> dict[str, object]:
    limit = found.config.report.answers
    cases = [_case(case) for case in found.cases]
    groups = list(dict.fromkeys(case.group for case in found.cases))
    sampled = (
        f"{len(cases)} prompts, drawn by seed (report.answers: at most {limit}). Scores are "
        "ROUGE-L in percent; the signed figure is the student after minus before."
    )
    return {
        "cases": cases,
        "groups": groups,
        "outcomes": {case.outcome for case in found.cases},
        "sampled": sampled,
    }


def _case(case: Case) -> dict[str, object]:
    answers = [
        {"title": MODELS[said.model], "text": shortened(said.text), "rouge_l": said.rouge_l}
        for said in case.answers
    ]
    return {
        "group": case.group,
        "example_id": case.example_id,
        "prompt": shortened(case.prompt),
        "context": shortened(case.context),
        "references": [shortened(text) for text in case.references],
        "answers": answers,
        "gain": case.gain,
        "outcome": case.outcome,
        "score": case.answers[-1].rouge_l if case.answers else None,
    }


def _charts(found: Material, series: Series) -> tuple[dict[str, charts.Spec], dict[str, Columns]]:
    """Returns the specifications of the charts that there are data for, and the data."""
    num_stages = max(1, len(found.stages))
    specs: dict[str, charts.Spec] = {}
    datasets: dict[str, Columns] = {"colours": {"stage": list(charts.stage_colours(num_stages))}}
    if series.num_steps:
        specs |= _training_charts(found, series, num_stages)
        names = [stage_name(float(cast("int", stage))) for stage in series.steps["stage"]]
        datasets |= {"steps": {**series.steps, "stage_name": list(names)}}
        datasets |= {"bands": series.bands, "dev": series.dev}
    whens = list(dict.fromkeys(map(str, series.quarters["when"])))
    for name in ("rouge_l", "cross_entropy", "kl"):
        if any(value is not None for value in series.quarters[name]):
            specs[f"quarters_{name}"] = charts.quarter_bars(name, whens, num_stages)
            datasets["quarters"] = series.quarters
    if found.ranking is not None:
        specs["scatter"] = charts.scatter(num_stages)
        specs["fused_curve"] = charts.fused_curve(num_stages, found.ranking.num_rows)
        datasets["ranking"] = found.ranking.points
        datasets["rank_bands"] = _rank_bands(found)
    times = cast("Row", found.numbers["time"])
    if times:
        seconds = cast("Row", times["seconds"])
        specs["times"] = charts.time_bars()
        datasets["times"] = {"name": list(seconds), "seconds": list(seconds.values())}
    return specs, datasets


def _training_charts(found: Material, series: Series, num_stages: int) -> dict[str, charts.Spec]:
    last = int(max(cast("list[int]", series.steps["step"])))
    metric = next((row["metric"] for row in found.metrics if row["kind"] == "dev"), None)
    titles = {"rouge_l": "Dev ROUGE-L, %", "loss": "Dev cross-entropy, nats"}
    dev_title = None if metric is None else titles[str(metric)]
    scales = {
        "tokens_per_second": 1.0,
        "peak_memory_bytes": 2.0**-30,
        "grad_norm": 1.0,
        "padding_share": 100.0,
    }
    lines = {
        name: charts.over_steps(name, num_stages, last, scale=scale)
        for name, scale in scales.items()
    }
    return {"timeline": charts.timeline(num_stages, last, series.mean_steps, dev_title), **lines}


def _rank_bands(found: Material) -> Columns:
    """Returns where in the ranking the rows lie that a stage adds."""
    ordering = found.config.curriculum.ordering
    if found.ranking is None or ordering == "shuffled":
        return {"stage": [], "start": [], "end": []}
    ends = [stage.num_examples for stage in found.stages]
    starts = [0, *ends[:-1]]
    if ordering == "reversed":
        count = found.ranking.num_rows
        starts, ends = [count - end for end in ends], [count - start for start in starts]
    return {
        "stage": [stage.index for stage in found.stages],
        "start": [start + 1 for start in starts],
        "end": list(ends),
    }
