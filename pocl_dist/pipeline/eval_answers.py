"""The answers of one model on one test set: shard by shard on disk, then one file. Loads no torch.

eval/<set>/shards/seed-10/   a pass until the set is complete: sealed shards, `quarantine.jsonl`
eval/<set>/answers.jsonl     one row per example and seed
eval/<set>/passes.json       how the passes went: rows that failed, batches that were halved
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pocl_dist.config import Config
from pocl_dist.data.sources import Rows
from pocl_dist.display.output import warn
from pocl_dist.errors import StorageError
from pocl_dist.files import atomic_write_json, atomic_write_text
from pocl_dist.metrics import exact_match, rouge_l
from pocl_dist.pipeline.answer_files import AnswerFiles
from pocl_dist.pipeline.quarantine import FILE, Quarantine
from pocl_dist.records import Example, RowFailure

STUDENT = "student"


@dataclass(frozen=True)
class Pair:
    """One model on one test set, and its files."""

    model: str
    set_name: str
    rows: Rows
    folder: Path

    def file(self, stem: str, suffix: str) -> Path:
        """Returns the pair's file; those of the student itself carry no model name."""
        return self.folder / (
            f"{stem}{suffix}" if self.model == STUDENT else f"{stem}-{self.model}{suffix}"
        )

    def _pass_folder(self, seed: int) -> Path:
        return self.file("shards", "") / f"seed-{seed}"

    def shards(self, seed: int) -> AnswerFiles:
        """Returns the answers of one pass as they come in."""
        return AnswerFiles(self._pass_folder(seed))

    def quarantine(self, config: Config, seed: int) -> Quarantine:
        """Returns the list of rows that a pass could not work on."""
        return Quarantine(self._pass_folder(seed) / FILE, config.data.max_bad_rows)


def _row(example: Example, seed: int, answer: str, failure: RowFailure | None) -> dict[str, object]:
    """Returns a row of the answers; one that failed has an empty answer, scores 0 and says why."""
    row: dict[str, object] = {
        "id": example.example_id,
        "seed": seed,
        "prompt": example.prompt,
        "context": example.context,
        "references": list(example.references),
        "answer": answer,
        "rouge_l": 0.0 if failure else rouge_l(answer, example.references),
        "exact_match": 0.0 if failure else exact_match(answer, example.references),
    }
    return {**row, "failure": failure.reason} if failure else row


def write_answers(config: Config, pair: Pair, seeds: Sequence[int]) -> None:
    """Writes a set that is complete as one file, and removes its shards."""
    lines, num_failed, num_halved = [], 0, 0
    for seed in sorted(seeds):
        texts = pair.shards(seed).read()
        failures = pair.quarantine(config, seed).read()
        num_failed += len(failures)
        num_halved += pair.shards(seed).count_halved()
        for example in pair.rows.examples:
            failure = failures.get(example.example_id)
            answer = "" if failure else texts.get(example.example_id)
            if answer is None:
                raise StorageError(
                    f"{pair.file('shards', '')}: the answer to {example.example_id!r} was saved, "
                    "but is not there any more; the same command asks for it again"
                )
            lines.append(json.dumps(_row(example, seed, answer, failure), ensure_ascii=False))
    passes = {"num_failed_answers": num_failed, "num_halved_batches": num_halved}
    atomic_write_json(pair.file("passes", ".json"), passes)
    atomic_write_text(pair.file("answers", ".jsonl"), "\n".join(lines) + "\n")
    remove_shards(pair)
    if num_failed:
        warn(
            f"{pair.set_name}: {num_failed} rows could not be answered by {pair.model} and score 0 "
            f"({pair.file('answers', '.jsonl')}, field failure)"
        )


def remove_shards(pair: Pair) -> None:
    """Removes the shards of a set that is written."""
    folder = pair.file("shards", "")
    if folder.exists():
        shutil.rmtree(folder)
