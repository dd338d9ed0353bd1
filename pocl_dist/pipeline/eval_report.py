"""Figures from the answers under `eval/`: `report.json` per test set and `table.md` over all."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pocl_dist.display.output import say
from pocl_dist.files import atomic_write_json, atomic_write_text, read_json, read_json_lines
from pocl_dist.metrics import ScoreSummary, summarise

_TITLES = {"student": "student", "teacher": "teacher", "student_before": "student before training"}


@dataclass(frozen=True)
class Figures:
    """One model on one test set: a summary per seed."""

    summary_of_seed: dict[int, ScoreSummary]

    def mean(self, metric: str) -> float:
        """Returns the mean of a metric over the seeds, in percent."""
        return statistics.fmean(
            getattr(summary, metric) for summary in self.summary_of_seed.values()
        )

    def std(self, metric: str) -> float:
        """Returns the sample standard deviation over the seeds; 0 for a single one."""
        values = [getattr(summary, metric) for summary in self.summary_of_seed.values()]
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def to_json(self) -> dict[str, object]:
        """Returns means, spreads and the figures of each seed."""
        return {
            "rouge_l": self.mean("rouge_l"),
            "exact_match": self.mean("exact_match"),
            "rouge_l_std": self.std("rouge_l"),
            "exact_match_std": self.std("exact_match"),
            "seeds": [
                {"seed": seed, "rouge_l": summary.rouge_l, "exact_match": summary.exact_match}
                for seed, summary in self.summary_of_seed.items()
            ],
        }

    def cell(self) -> str:
        """Returns the two figures with two decimals, for a table."""
        spread = f" ± {self.std('rouge_l'):.2f}" if len(self.summary_of_seed) > 1 else ""
        return f"{self.mean('rouge_l'):.2f}{spread} / {self.mean('exact_match'):.2f}"


def read_figures(answers: Path) -> Figures:
    """Returns the figures of a file of answers."""
    by_seed: dict[int, list[dict[str, object]]] = {}
    for row in read_json_lines(answers):
        by_seed.setdefault(int(str(row["seed"])), []).append(dict(row))
    summaries = {
        seed: summarise(
            [float(str(r["rouge_l"])) for r in rows], [float(str(r["exact_match"])) for r in rows]
        )
        for seed, rows in by_seed.items()
    }
    return Figures(summaries)


def _passes(folder: Path, answers: str) -> dict[str, object]:
    """Returns how many answers failed, which score 0, and how many batches were halved."""
    name = answers.replace("answers", "passes").replace(".jsonl", ".json")
    return dict(read_json(folder / name))


def write_reports(
    folder: Path, set_names: Sequence[str], models: Sequence[str], student_digest: str
) -> None:
    """Writes `<set>/report.json` per test set and `table.md`; first of `models` is the student."""
    figures: dict[str, dict[str, Figures]] = {}
    for name in set_names:
        files = {
            model: "answers.jsonl" if model == models[0] else f"answers-{model}.jsonl"
            for model in models
        }
        figures[name] = {model: read_figures(folder / name / file) for model, file in files.items()}
        of_student = figures[name][models[0]]
        report: dict[str, object] = {
            "set": name,
            "num_examples": next(iter(of_student.summary_of_seed.values())).num_examples,
            **of_student.to_json(),
            **_passes(folder / name, files[models[0]]),
            "model": student_digest,
        }
        if len(models) > 1:
            report["baselines"] = {
                model: figures[name][model].to_json() | _passes(folder / name, files[model])
                for model in models[1:]
            }
        atomic_write_json(folder / name / "report.json", report)
    table = _table(figures, models)
    atomic_write_text(folder / "table.md", table)
    say(table.rstrip("\n"))


def _table(figures: dict[str, dict[str, Figures]], models: Sequence[str]) -> str:
    """Returns a Markdown table, models x test sets."""
    lines = [
        "| ROUGE-L / exact match, % | " + " | ".join(figures) + " |",
        "|---" * (len(figures) + 1) + "|",
    ]
    for model in models:
        cells = [of_model[model].cell() for of_model in figures.values()]
        lines.append(f"| {_TITLES.get(model, model)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
