"""The page of a run, from what was gathered: values for the template, charts and their data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from pocl_dist.config import Config, dump_config
from pocl_dist.files import JSONValue
from pocl_dist.pipeline.report_page import charts, facts
from pocl_dist.pipeline.report_page.answers import MODELS, Case, shortened
from pocl_dist.pipeline.report_page.chart_parts import Spec, stage_colours
from pocl_dist.pipeline.report_page.gather import Material
from pocl_dist.pipeline.report_page.page import Page
from pocl_dist.pipeline.report_page.ranking import Ranking
from pocl_dist.pipeline.report_page.series import Columns, Row, Series, make_series, stage_name
from pocl_dist.pipeline.report_page.training_charts import over_steps, timeline


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


def _charts(found: Material, series: Series) -> tuple[dict[str, Spec], dict[str, Columns]]:
    """Returns the specifications of the charts that there are data for, and the data."""
    num_stages = max(1, len(found.stages))
    specs: dict[str, Spec] = {}
    datasets: dict[str, Columns] = {"colours": {"stage": list(stage_colours(num_stages))}}
    if series.num_steps:
        specs |= _training_charts(found, series, num_stages)
        shown = [int(cast("int", stage)) + 1 for stage in series.steps["stage"]]
        datasets |= {"steps": {**series.steps, "stage_shown": list(shown)}}
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
        specs["times"] = charts.time_bars(len(seconds))
        datasets["times"] = {"name": list(seconds), "seconds": list(seconds.values())}
    return specs, datasets


def _training_charts(found: Material, series: Series, num_stages: int) -> dict[str, Spec]:
    last = int(max(cast("list[int]", series.steps["step"])))
    metric = next((row["metric"] for row in found.metrics if row["kind"] == "dev"), None)
    titles = {"rouge_l": "Dev ROUGE-L, %", "loss": "Dev cross-entropy, nats"}
    dev_title = None if metric is None else titles[str(metric)]
    scales = {
        "tokens_per_second": (1.0, "~s"),
        "peak_memory_bytes": (2.0**-30, ".3~g"),
        "grad_norm": (1.0, ".3~g"),
        "padding_share": (100.0, ".3~g"),
    }
    lines = {
        name: over_steps(name, num_stages, last, scale=scale, form=form)
        for name, (scale, form) in scales.items()
    }
    return {"timeline": timeline(num_stages, last, series.mean_steps, dev_title), **lines}


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
        "start": [max(1, start) for start in starts],
        "end": list(ends),
    }
