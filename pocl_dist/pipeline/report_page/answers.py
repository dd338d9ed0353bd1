"""A bounded sample of answers: teacher, student before and after on one prompt, side by side."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pocl_dist.config import Config
from pocl_dist.data.sources import Rows
from pocl_dist.files import JSONValue, read_json_lines
from pocl_dist.metrics import rouge_l
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.records import DifficultyRecord

MODELS = {"teacher": "teacher", "student_before": "student before", "student": "student after"}
"""Name in the files -> title, in the order of the columns."""
LONGEST_TEXT = 2000


@dataclass(frozen=True)
class Answer:
    """What one model said, and its ROUGE-L in percent; None where it was not scored."""

    model: str
    text: str
    rouge_l: float | None


@dataclass(frozen=True)
class Case:
    """One prompt with its reference and what each model made of it."""

    group: str
    example_id: str
    prompt: str
    context: str
    references: tuple[str, ...]
    answers: tuple[Answer, ...] = field(default=())

    @property
    def gain(self) -> float | None:
        """Returns ROUGE-L of the student after minus before; None where one is not there."""
        scores = {answer.model: answer.rouge_l for answer in self.answers}
        before, after = scores.get("student_before"), scores.get("student")
        return None if before is None or after is None else after - before

    @property
    def outcome(self) -> str:
        """Returns how the student changed on it, for the filter."""
        if self.gain is None:
            return "unknown"
        return "same" if self.gain == 0 else "better" if self.gain > 0 else "worse"


def shortened(text: str) -> str:
    """Returns text of bounded length that says what it lacks."""
    rest = len(text) - LONGEST_TEXT
    return text if rest <= 0 else f"{text[:LONGEST_TEXT]} … ({rest} characters more)"


def _drawn(count: int, limit: int, seed: str) -> list[int]:
    return sorted(random.Random(seed).sample(range(count), min(count, max(0, limit))))


def test_cases(config: Config, run: RunDirectory, limit: int) -> list[Case]:
    """Returns sampled rows of the test sets that are answered, `limit` in all, shared evenly."""
    sets = sorted(path.parent for path in run.eval.glob("*/answers.jsonl"))
    return [
        case for folder in sets for case in _of_set(folder, limit // len(sets), str(config.seed))
    ]


def _file(folder: Path, model: str) -> Path:
    return folder / ("answers.jsonl" if model == "student" else f"answers-{model}.jsonl")


def _of_set(folder: Path, limit: int, seed: str) -> Iterator[Case]:
    rows = read_json_lines(_file(folder, "student"))
    first = [row for row in rows if row["seed"] == rows[0]["seed"]]
    chosen = [first[place] for place in _drawn(len(first), limit, f"{seed} {folder.name}")]
    said = {model: _by_id(_file(folder, model), rows[0]["seed"]) for model in MODELS}
    for row in chosen:
        found = {model: by_id.get(str(row["id"])) for model, by_id in said.items()}
        yield Case(
            group=f"test set {folder.name}",
            example_id=str(row["id"]),
            prompt=str(row["prompt"]),
            context=str(row["context"]),
            references=tuple(map(str, _list(row["references"]))),
            answers=tuple(
                Answer(model, str(other["answer"]), 100.0 * float(str(other["rouge_l"])))
                for model, other in found.items()
                if other is not None
            ),
        )


def _by_id(file: Path, seed: JSONValue) -> dict[str, Mapping[str, JSONValue]]:
    """Returns the rows of one seed; greedy baselines have but one, which then counts."""
    rows = read_json_lines(file)
    seeds = {row["seed"] for row in rows}
    wanted = seed if seed in seeds else next(iter(seeds), None)
    return {str(row["id"]): row for row in rows if row["seed"] == wanted}


def _list(value: JSONValue) -> Sequence[JSONValue]:
    return value if isinstance(value, list) else [value]


def training_cases(
    rows: Rows,
    records: Sequence[DifficultyRecord],
    generated: Mapping[str, str],
    limit: int,
    seed: int,
) -> list[Case]:
    """Returns sampled training rows with the answer of the student before, as measured.

    `generated` has the teacher's answers by id (SeqKD); a row may have none.
    """
    by_id = rows.by_id()
    measured = [record for record in records if record.example_id in by_id]
    cases = []
    for place in _drawn(len(measured), limit, f"{seed} training rows"):
        record = measured[place]
        example = by_id[record.example_id]
        answers = [Answer("student_before", record.answer, 100.0 * record.rouge_l)]
        text = generated.get(record.example_id)
        if text is not None:
            answers.insert(0, Answer("teacher", text, 100.0 * rouge_l(text, example.references)))
        cases.append(
            Case(
                "training rows",
                example.example_id,
                example.prompt,
                example.context,
                example.references,
                tuple(answers),
            )
        )
    return cases
