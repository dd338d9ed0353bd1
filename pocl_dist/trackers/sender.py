"""Sends lines of `metrics.jsonl` to trackers, each in a thread of its own.

A tracker that is slow is waited for at the end only, and not for long; one that fails, whatever its
library raises, is told of once and left out from then on. `metrics.jsonl` has every line.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from pocl_dist.config import Config
from pocl_dist.config.keys import flatten
from pocl_dist.display.output import warn
from pocl_dist.files import JSONValue, atomic_write_json, read_json
from pocl_dist.trackers.base import TrackedRun, Tracker
from pocl_dist.trackers.registry import opener, wanted_trackers

QUEUE_ROWS = 10_000
"""Lines that wait for a tracker; hours of most trainings. More are dropped, and that is told."""
CLOSE_SECONDS = 30.0
"""At the end all trackers together are waited for this long."""
FOLDER = "trackers"


@dataclass(frozen=True)
class Row:
    """The numbers of one line."""

    kind: str
    step: int
    values: Mapping[str, float]


def row_of(line: Mapping[str, object]) -> Row:
    """Returns the numbers of a line of `metrics.jsonl`; those of a list by names that count from 1.

    Words are left out.
    """
    flat: dict[str, object] = {}
    for key, value in line.items():
        parts = enumerate(value, start=1) if isinstance(value, list) else ()
        flat |= {f"{key}_{number}": part for number, part in parts} or {key: value}
    numbers = {k: float(v) for k, v in flat.items() if isinstance(v, int | float) and k != "step"}
    return Row(str(line["kind"]), int(cast("int", line["step"])), numbers)


class Sender:
    """One tracker and its thread."""

    def __init__(
        self, name: str, open_tracker: Callable[[], Tracker], sent: Mapping[str, int]
    ) -> None:
        self.name = name
        self._open = open_tracker
        self._sent = sent  # kind -> last step that an earlier attempt has sent
        self._rows: queue.Queue[Row | None] = queue.Queue(QUEUE_ROWS)
        self._has_failed = False
        self._num_dropped = 0
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def send(self, row: Row) -> None:
        """Hands a line over; never waits."""
        if self._has_failed:
            return
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._num_dropped += 1
            if self._num_dropped == 1:
                warn(f"log.trackers: {self.name} is too slow; lines are left out there")

    def end(self) -> None:
        """Says that no line follows."""
        while not self._has_failed:
            try:
                return self._rows.put_nowait(None)
            except queue.Full:  # the end matters more than a line
                self._rows.get_nowait()
                self._num_dropped += 1

    def join(self, seconds: float) -> None:
        """Waits, not longer than that, until all is sent."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            warn(f"log.trackers: {self.name} did not end within {CLOSE_SECONDS:g} s")
        elif self._num_dropped:
            warn(f"log.trackers: {self.name} lacks {self._num_dropped} lines of metrics.jsonl")

    def _work(self) -> None:
        try:
            tracker = self._open()
            while (row := self._rows.get()) is not None:
                if tracker.can_rewrite or row.step > self._sent.get(row.kind, -1):
                    tracker.log(row.kind, row.step, row.values)
            tracker.close()
        except Exception as error:  # of a library, over a network: none of it may end a training
            self._has_failed = True
            text = " ".join(f"{type(error).__name__}: {error}".split())
            warn(f"log.trackers: {self.name} failed and gets nothing more: {text}")


def tracked_config(config: Config) -> dict[str, JSONValue]:
    """Returns {dotted key: value} for trackers; not how jobs are started, whose variables may be
    secret."""
    return flatten(config.model_dump(mode="json", exclude={"launch"}))


class Trackers:
    """All trackers of a run; the one place that sends."""

    def __init__(self, config: Config, root: Path, resume_step: int, sent: Mapping[str, int]):
        settings = config.log
        name = settings.run_name or root.resolve().name
        values = tracked_config(config)
        self._senders = []
        for tracker in wanted_trackers(settings):
            folder = root / FOLDER / tracker
            run = TrackedRun(name, settings, values, folder, resume_step, None)
            self._senders.append(Sender(tracker, _reopener(tracker, run), sent))

    def send(self, line: Mapping[str, object]) -> None:
        """Sends a line of `metrics.jsonl`; never waits, never raises."""
        row = row_of(line)
        for sender in self._senders:
            sender.send(row)

    def close(self) -> None:
        """Ends all; waits for what is not sent yet, but not longer than `CLOSE_SECONDS` in all."""
        for sender in self._senders:
            sender.end()
        deadline = time.monotonic() + CLOSE_SECONDS
        for sender in self._senders:
            sender.join(max(0.0, deadline - time.monotonic()))


def _reopener(tracker: str, run: TrackedRun) -> Callable[[], Tracker]:
    """Returns what opens the run, the same as before if this tracker had it, and notes its id."""
    record = run.folder.with_name(f"{tracker}.json")
    settings = run.settings
    place: dict[str, JSONValue] = {
        "project": settings.project,
        "run_name": run.name,
        "place": {"mlflow": settings.mlflow_uri, "trackio": settings.trackio_space}.get(tracker),
    }

    def open_again() -> Tracker:
        known = read_json(record) if record.exists() else {}
        is_same = {key: known.get(key) for key in place} == place
        run_id = str(known["run_id"]) if is_same and "run_id" in known else None
        opened = opener(tracker)(replace(run, run_id=run_id))
        if run_id is None:
            atomic_write_json(record, {**place, "run_id": opened.run_id})
        return opened

    return open_again
