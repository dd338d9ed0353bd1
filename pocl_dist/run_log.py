"""What a run records of itself: `metrics.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from pocl_dist.failpoints import failpoint
from pocl_dist.files import atomic_write_text, read_json_lines, writing


class MetricsLog:
    """Appends JSON lines to `metrics.jsonl`; a resumed run first drops those it writes again.

    `unfinished`: kinds that it writes again also at `resume_step` itself.
    """

    def __init__(self, path: Path, resume_step: int, unfinished: Collection[str] = ()) -> None:
        rows = read_json_lines(path)
        kept = [
            row
            for row in rows
            if int(row["step"]) < resume_step + (row["kind"] not in unfinished)  # type: ignore
        ]
        self.written_before: dict[str, int] = {}
        """{kind: last step} of an earlier attempt, those that are dropped among them."""
        for row in rows:
            kind, step = str(row["kind"]), int(row["step"])  # type: ignore[arg-type]
            self.written_before[kind] = max(step, self.written_before.get(kind, -1))
        # The line of a step is written after the step: at the resumed step it is already there.
        atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._path = path
        # Unbuffered: after a full disk nothing is left that `close` would fail to write again.
        self._stream = path.open("ab", buffering=0)

    def write(self, row: dict[str, object]) -> None:
        """Appends one object, floats unrounded. Half a line on a full disk counts as none."""
        data = (json.dumps(row, allow_nan=False) + "\n").encode()
        with writing(self._path, len(data)):
            failpoint("metrics.write")
            while data:
                data = data[self._stream.write(data) :]

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()
