"""Rows that a pass could not work on: listed with the cause, left out, within a budget."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pocl_dist.errors import DataError
from pocl_dist.files import atomic_write_text, read_json_lines
from pocl_dist.records import RowFailure

FILE = "quarantine.jsonl"


@dataclass(frozen=True)
class Quarantine:
    """The list of a pass: `quarantine.jsonl` in its folder."""

    path: Path
    max_rows: int  # data.max_bad_rows

    def read(self) -> dict[str, RowFailure]:
        """Returns {example id: why it is left out}; raises DataError (65) for another file."""
        try:
            rows = [RowFailure.from_json(dict(row)) for row in read_json_lines(self.path)]
        except ValueError as error:
            raise DataError(f"{self.path} is no list of rows: {error}") from error
        return {row.example_id: row for row in rows}

    def unworkable(self) -> set[str]:
        """Returns the ids of rows not to be tried again; one without a finite score does no harm.

        It stays in its batch, so that the others come out to the same bits.
        """
        return {name for name, row in self.read().items() if row.cause != "not finite"}

    def add(self, failures: Sequence[RowFailure]) -> None:
        """Lists rows, each once; raises DataError (65) when there are more than the budget."""
        if not failures:
            return
        known = self.read() | {row.example_id: row for row in failures}
        lines = [json.dumps(row.to_json(), ensure_ascii=False) for row in known.values()]
        atomic_write_text(self.path, "\n".join(lines) + "\n")
        if len(known) > self.max_rows:
            last = failures[-1]
            raise DataError(
                f"{self.path}: {len(known)} rows cannot be worked on, the last "
                f"({last.example_id!r}): {last.reason} (data.max_bad_rows is {self.max_rows})"
            )
