"""metrics.jsonl: what is written, and what a resumed run drops first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pocl_dist.files import read_json_lines
from pocl_dist.run_log import MetricsLog


def test_a_resumed_log_keeps_the_lines_up_to_its_step_and_drops_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "step", "step": step, "loss": 1 / 3}) for step in (1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"kind": "step", "st')
    log = MetricsLog(path, resume_step=2)
    assert log.written_before == {"step": 3}
    log.write({"kind": "step", "step": 3, "loss": 0.1})
    log.close()
    rows = read_json_lines(path)
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1 / 3), (2, 1 / 3), (3, 0.1)]


def test_a_line_of_the_resumed_step_that_is_written_again_is_dropped_first(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [("step", 1), ("step", 2), ("dev", 2), ("quarters", 2), ("step", 3)]
    path.write_text("".join(json.dumps({"kind": kind, "step": n}) + "\n" for kind, n in rows))
    MetricsLog(path, 2, unfinished=("quarters",)).close()
    kept = [(row["kind"], row["step"]) for row in read_json_lines(path)]
    assert kept == [("step", 1), ("step", 2), ("dev", 2)]


def test_a_number_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    with pytest.raises(ValueError):
        log.write({"kind": "step", "step": 1, "loss": float("nan")})
