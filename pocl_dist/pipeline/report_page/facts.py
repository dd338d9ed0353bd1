"""Headline figures, test table and provenance of a run, as the page shows them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from pocl_dist.config import Config
from pocl_dist.files import JSONValue, read_json
from pocl_dist.models.sources import MARKER
from pocl_dist.pipeline.report_page.series import Row
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.records import Stage

METRICS = {"rouge_l": "ROUGE-L", "exact_match": "Exact match"}
"""Name in the files -> title."""
_MODELS = {
    "teacher": "teacher",
    "student_before": "student before training",
    "student": "student after training",
}


@dataclass(frozen=True)
class Headline:
    """A figure with what it is and what to hold it against."""

    title: str
    value: str
    unit: str = ""
    note: str = ""


def headlines(
    numbers: Mapping[str, JSONValue], metrics: Sequence[Row], stages: Sequence[Stage]
) -> list[Headline]:
    """Returns the figures that come first; those that the run does not have are left out."""
    return [
        *_test_headlines(cast("Mapping[str, Row]", numbers["eval"])),
        *_dev_headline(metrics),
        *_kl_headline(cast("Sequence[Row]", numbers["quarters"]), metrics),
        *_work_headlines(metrics, stages),
        *_time_headlines(cast("Row", numbers["time"])),
    ]


def _mean_over_sets(evals: Mapping[str, Row], model: str, metric: str) -> float | None:
    """Returns the mean over the test sets; None unless the model answered all of them."""
    values = []
    for report in evals.values():
        scores = report
        if model != "student":
            found = cast("Mapping[str, Row]", report.get("baselines") or {}).get(model)
            if found is None:
                return None
            scores = found
        values.append(float(cast("float", scores[metric])))
    return statistics.fmean(values) if values else None


def _test_headlines(evals: Mapping[str, Row]) -> Iterator[Headline]:
    where = "" if len(evals) < 2 else f", mean of {len(evals)} sets"
    for metric, name in METRICS.items():
        title = f"Test set: {name}"
        after = _mean_over_sets(evals, "student", metric)
        if after is None:
            continue
        before = _mean_over_sets(evals, "student_before", metric)
        teacher = _mean_over_sets(evals, "teacher", metric)
        notes = [] if before is None else [f"before {before:.2f}"]
        notes += [] if teacher is None else [f"teacher {teacher:.2f}"]
        if before is not None and teacher is not None and teacher > before:
            share = (after - before) / (teacher - before)
            notes.append(f"{share:.0%} of the gap closed")
        yield Headline(title + where, f"{after:.2f}", "%", " · ".join(notes))


def _dev_headline(metrics: Sequence[Row]) -> Iterator[Headline]:
    rows = [row for row in metrics if row["kind"] == "dev"]
    if not rows:
        return
    name = str(rows[-1]["metric"])
    values = [float(cast("float", row["value"])) for row in rows]
    best = max(values) if name == "rouge_l" else min(values)
    at = rows[values.index(best)]["step"]
    title = "Dev ROUGE-L" if name == "rouge_l" else "Dev cross-entropy"
    note = f"first {values[0]:.2f} · best {best:.2f} at step {at}"
    yield Headline(title, f"{values[-1]:.2f}", "%" if name == "rouge_l" else "nats", note)


def _kl_headline(quarters: Sequence[Row], metrics: Sequence[Row]) -> Iterator[Headline]:
    """Of the same rows first and last where quarters were scored; else of the last steps."""
    pairs = [(row["kl"], row["num_rows"]) for row in quarters]
    means = [_weighted(kl, count) for kl, count in pairs]
    if len(means) > 1 and means[0] is not None and means[-1] is not None:
        note = f"before {means[0]:.3f} · same training rows"
        yield Headline("KL to the teacher, T = 1", f"{means[-1]:.3f}", "nats", note)
        return
    steps = [row for row in metrics if row["kind"] == "step" and row["kl"]]
    if steps:
        last = [float(cast("float", row["kl"])) for row in steps[-max(1, len(steps) // 50) :]]
        note = f"training rows, mean of the last {len(last)} steps"
        title = "KL to the teacher, T = 1"
        yield Headline(title, f"{statistics.fmean(last):.3f}", "nats", note)


def _weighted(values: JSONValue, counts: JSONValue) -> float | None:
    """Returns the mean over quarters that have rows."""
    pairs = zip(cast("list[float | None]", values), cast("list[int]", counts), strict=True)
    known = [(value, count) for value, count in pairs if value is not None]
    total = sum(count for _, count in known)
    return sum(value * count for value, count in known) / total if total else None


def _work_headlines(metrics: Sequence[Row], stages: Sequence[Stage]) -> Iterator[Headline]:
    steps = [row for row in metrics if row["kind"] == "step"]
    if not steps:
        return
    visits = sum(stage.num_examples * stage.epochs for stage in stages)
    planned = sum(stage.num_steps for stage in stages)
    note = f"{len(stages)} stage{'s' * (len(stages) > 1)} · {visits:,.0f} sample visits planned"
    done = f"{len(steps):,}" if len(steps) >= planned else f"{len(steps):,} of {planned:,}"
    yield Headline("Steps", done, "", note)
    speed = statistics.median(float(cast("float", row["tokens_per_second"])) for row in steps)
    padding = statistics.fmean(float(cast("float", row["padding_share"])) for row in steps)
    note = f"median over steps · {padding:.0%} padding besides"
    yield Headline("Throughput", f"{speed:,.0f}", "tokens/s", note)
    peak = max(float(cast("float", row["peak_memory_bytes"])) for row in steps)
    yield Headline("Peak memory", f"{peak / 2**30:.2f}", "GiB", "of the rank with most")


def _time_headlines(times: Row) -> Iterator[Headline]:
    if not times:
        return
    total = float(cast("float", times["total_seconds"]))
    share = float(cast("float", times["measure_and_plan_share"]))
    note = f"{share:.1%} of it measuring and planning" if share else "no measuring needed"
    yield Headline("Time, all steps", duration(total), "", note)


def duration(seconds: float) -> str:
    """Returns a time as people write it."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{seconds:.1f} s"


def test_table(evals: Mapping[str, Row]) -> list[dict[str, object]]:
    """Returns a row per test set and model, teacher first: figures in percent."""
    table: list[dict[str, object]] = []
    for name, report in evals.items():
        baselines = cast("Mapping[str, Row]", report.get("baselines") or {})
        scores = {**baselines, "student": report}
        for model in [known for known in _MODELS if known in scores]:
            row = scores[model]
            seeds = cast("list[JSONValue]", row["seeds"])
            table.append(
                {
                    "set": name,
                    "num_examples": report["num_examples"],
                    "model": _MODELS[model],
                    "num_seeds": len(seeds),
                    **{
                        key: float(cast("float", row[key]))
                        for key in ("rouge_l", "rouge_l_std", "exact_match", "exact_match_std")
                    },
                    "num_failed": row.get("num_failed_answers", 0),
                }
            )
    return table


def method(config: Config) -> str:
    """Returns what was trained how, in one line."""
    if config.models.teacher is None:
        return "SFT without a teacher"
    kinds = {"references": "", "teacher": "SeqKD, "}
    stages = config.curriculum.num_stages
    order = {"curriculum": "easy to hard", "shuffled": "shuffled", "reversed": "hard to easy"}
    plan = (
        "plain distillation"
        if stages == 1
        else f"{stages} stages, {order[config.curriculum.ordering]}"
    )
    on_policy = "" if config.policy.mode == "off" else f", on-policy {config.policy.mode}"
    loss = config.loss.name.replace("_", " ")
    return f"{kinds[config.data.responses]}{loss}, {plan}{on_policy}"


def provenance(config: Config, run: RunDirectory) -> dict[str, dict[str, str]]:
    """Returns {title: {name: value}}: models, digests, environment; what is not there is left out.

    Of what stands in records: nothing is hashed here.
    """
    status = _record(run, "status.json")
    inputs = _record(run, "checkpoints/inputs.json")
    digests = {
        key.removeprefix("digest."): str(value)
        for key, value in inputs.items()
        if key.startswith("digest.") and value is not None
    }
    if (run.export / MARKER).exists():
        digests["plan.json"] = str(_record(run, f"export/{MARKER}").get("plan sha256"))
    teacher = config.models.teacher
    models = {
        "teacher": "none" if teacher is None else teacher.path,
        "student": config.models.student.path or "layers of the teacher",
        "training rows": config.data.train,
    }
    for key, value in _record(run, "models.json").items():
        models[f"{key}, commit"] = str(cast("Row", value).get("commit"))
    versions = cast("Mapping[str, JSONValue]", status.get("versions") or {})
    known = ("host", "slurm_job_id", "kubernetes_pod", "attempt", "num_skipped", "num_overflows")
    environment = {key: str(status[key]) for key in known if status.get(key) is not None}
    environment |= {key: str(value) for key, value in versions.items() if value is not None}
    return {"Models and rows": models, "sha256": digests, "Environment": environment}


def _record(run: RunDirectory, name: str) -> Mapping[str, JSONValue]:
    path = run.root / name
    return read_json(path) if path.exists() else {}
