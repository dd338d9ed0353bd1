"""metrics.jsonl and the trackers: what is written, and what a resumed run drops first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pocl_dist.errors import ConfigError
from pocl_dist.files import read_json_lines
from pocl_dist.run_log import MetricsLog, TrainingDisplay, numbers_of
from pocl_dist.trackers import open_trackers


def test_a_resumed_log_keeps_the_lines_up_to_its_step_and_drops_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "step", "step": step, "loss": 1 / 3}) for step in (1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"kind": "step", "st')
    log = MetricsLog(path, resume_step=2)
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


def test_trackers_get_each_number_of_a_list_under_a_name_of_its_own() -> None:
    row = {"kind": "quarters", "step": 7, "rouge_l": [1.5, None], "seconds": 2, "metric": "x"}
    assert numbers_of(row) == {"rouge_l_1": 1.5, "seconds": 2.0}


def test_a_number_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    with pytest.raises(ValueError):
        log.write({"kind": "step", "step": 1, "loss": float("nan")})


def test_tensorboard_gets_every_number_under_its_kind(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (tracker,) = open_trackers(True, tmp_path, 0)
    for step in (1, 2):
        tracker.log("step", step, {"loss": step / 2})
    tracker.close()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("step/loss")] == [(1, 0.5), (2, 1.0)]


def test_no_tracker_is_opened_when_none_is_wanted(tmp_path: Path) -> None:
    assert open_trackers(False, tmp_path, 0) == []
    assert not (tmp_path / "tensorboard").exists()


def test_outside_a_terminal_the_display_prints_every_few_steps(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = {"stage": 0, "temperature": 1.0, "kd_ratio": 0.7, "loss": 2.0, "tokens_per_second": 100.0}
    with TrainingDisplay(5, every=2).live() as display:
        for step in range(1, 6):
            display.step({**row, "step": step}, 1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["2/5", "4/5", "5/5"]
    assert "T=1.00 ratio=0.70 loss=2.0000" in lines[0]


def test_wanting_tensorboard_without_the_package_is_a_config_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pocl_dist.trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"log\.tensorboard"):
        open_trackers(True, tmp_path, 0)
    assert open_trackers(None, tmp_path, 0) == []
