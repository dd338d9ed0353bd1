"""Trackers, offline: what each library reads back is what stands in metrics.jsonl."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pocl_dist.config import Config
from pocl_dist.errors import ConfigError
from pocl_dist.files import read_json_lines
from pocl_dist.run_log import MetricsLog
from pocl_dist.trackers import registry
from pocl_dist.trackers.sender import Sender, Trackers, row_of, tracked_config

Series = dict[str, list[tuple[int, float]]]
SECRET = "canary-wandb-api-key-0b1d6c"


def config_of(run_dir: Path, **log: object) -> Config:
    return Config.model_validate(
        {
            "run_dir": str(run_dir),
            "models": {"teacher": None, "student": {"path": "student"}},
            "data": {"train": "train.jsonl"},
            "curriculum": {"num_stages": 1},
            "launch": {"environment": {"TOKEN": "canary-launch-environment"}},
            "log": log,
        }
    )


def lines(first: int, last: int) -> list[dict[str, object]]:
    steps: list[dict[str, object]] = [
        {"kind": "step", "step": n, "stage": 0, "loss": 1.0 / n, "temperature": 1.0, "note": "word"}
        for n in range(first, last + 1)
    ]
    return [*steps, {"kind": "dev", "step": last, "stage": 0, "metric": "rouge_l", "value": 1 / 3}]


def attempt(config: Config, run_dir: Path, resume_step: int, last: int) -> None:
    """Writes and sends what an attempt of training does, up to step `last`."""
    log = MetricsLog(run_dir / "metrics.jsonl", resume_step)
    trackers = Trackers(config, run_dir, resume_step, log.written_before)
    for line in lines(max(resume_step, 0) + 1, last):
        log.write(line)
        trackers.send(line)
    log.close()
    trackers.close()


def read_tensorboard(folder: Path) -> Series:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


def wandb_records(file: Path) -> list[object]:
    """Returns the records of an offline file: a LevelDB log of protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, records, parts = file.read_bytes(), [], b""
    position = 7  # the header
    while position + 7 <= len(data):
        if (rest := 32768 - position % 32768) < 7:
            position += rest
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0:
            break
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def read_wandb(folder: Path) -> Series:
    found: Series = {}
    ids = set()
    for file in sorted(folder.rglob("*.wandb"), key=lambda path: path.stat().st_mtime):
        for record in wandb_records(file):
            if record.HasField("run"):  # type: ignore[attr-defined]
                ids.add(record.run.run_id)  # type: ignore[attr-defined]
            items = record.history.item  # type: ignore[attr-defined]
            values = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items
            }
            for key, value in values.items():
                if "/" in key:
                    found.setdefault(key, []).append((int(values["step"]), value))
    assert len(ids) == 1, "both attempts are one run"
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    return found


def read_mlflow(folder: Path) -> Series:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=folder.resolve().as_uri())
    experiment = client.get_experiment_by_name("proof")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "first" and run.info.status == "FINISHED"
    assert run.data.params["optimizer.learning_rate"] == "0.0001"
    assert not any(key.startswith("launch") for key in run.data.params)
    history = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    return {key: [(m.step, m.value) for m in metrics] for key, metrics in history.items()}


def read_trackio(folder: Path) -> Series:
    from trackio.sqlite_storage import SQLiteStorage

    assert list(folder.glob("*.db"))
    (name,) = {str(record["name"]) for record in SQLiteStorage.get_run_records("proof")}
    found: Series = {}
    for row in SQLiteStorage.get_logs("proof", name):
        for key in row:
            if "/" in key:
                found.setdefault(key, []).append((row["step"], row[key]))
    return found


READERS: dict[str, Callable[[Path], Series]] = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
}


@pytest.mark.parametrize("name", READERS)
def test_a_tracker_has_every_number_of_metrics_jsonl_once_also_after_a_resume_from_earlier(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not registry.is_installed(name):
        extra = registry.TRACKERS[name].extra
        pytest.skip(f"{name} IS NOT TESTED: pip install 'pocl_dist[{extra}]'")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "first"
    run_dir.mkdir()
    config = config_of(run_dir, trackers=[name], project="proof")
    attempt(config, run_dir, -1, 5)
    attempt(config, run_dir, 3, 8)
    assert "log.trackers" not in capsys.readouterr().err
    expected: Series = {}
    for line in read_json_lines(run_dir / "metrics.jsonl"):
        row = row_of(line)
        for key, value in row.values.items():
            expected.setdefault(f"{row.kind}/{key}", []).append((row.step, value))
    assert [step for step, _ in expected["step/loss"]] == list(range(1, 9))
    found = READERS[name](run_dir / "trackers" / name)
    if name != "tensorboard":  # there the dev line of the attempt that was lost is hidden
        expected["dev/value"].insert(0, (5, 1 / 3))
        expected["dev/stage"].insert(0, (5, 0.0))
    assert found.keys() == expected.keys()
    for key, series in expected.items():
        tolerance = 1e-7 if name == "tensorboard" else 0.0  # which keeps 32 bits
        assert [step for step, _ in found[key]] == [step for step, _ in series]
        assert [v for _, v in found[key]] == pytest.approx([v for _, v in series], rel=tolerance)
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    for secret in (SECRET, "canary-launch-environment"):
        assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_a_tracker_that_cannot_write_is_warned_of_once_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "trackers").write_text("no folder")
    attempt(config_of(tmp_path, trackers=["tensorboard"]), tmp_path, -1, 50)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: log.trackers: tensorboard failed and gets nothing more")
    assert len(read_json_lines(tmp_path / "metrics.jsonl")) == 51


def test_a_tracker_that_does_not_answer_keeps_nobody_waiting(
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers = threading.Event()

    def never() -> registry.Tracker:
        answers.wait()
        raise OSError("no network")

    sender = Sender("wandb", never, {})
    for line in lines(1, 12_000):
        sender.send(row_of(line))
    sender.end()
    sender.join(0.05)
    warnings = capsys.readouterr().err.splitlines()
    assert [line.split(": ", 2)[2] for line in warnings] == [
        "wandb is too slow; lines are left out there",
        "wandb did not end within 30 s",
    ]
    answers.set()
    sender.join(5.0)
    assert "wandb failed and gets nothing more: OSError: no network" in capsys.readouterr().err


def test_a_tracker_that_is_asked_for_and_not_installed_is_a_config_error_that_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    for name, entry in registry.TRACKERS.items():
        with pytest.raises(ConfigError, match=rf"{name} needs .* 'pocl_dist\[{entry.extra}\]'"):
            registry.wanted_trackers(config_of(tmp_path, trackers=[name]).log)
    assert registry.wanted_trackers(config_of(tmp_path).log) == []


def test_a_folder_that_a_tracker_left_behind_is_not_taken_for_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "absent_tracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = registry.Entry("absent_tracker", "track", "None")
    monkeypatch.setattr(registry, "TRACKERS", {"wandb": entry})
    assert not registry.is_installed("wandb")


def test_no_tracker_is_opened_when_none_is_wanted(tmp_path: Path) -> None:
    attempt(config_of(tmp_path, trackers=[]), tmp_path, -1, 2)
    assert not (tmp_path / "trackers").exists()


def test_a_user_and_password_in_the_uri_are_refused_without_being_repeated(tmp_path: Path) -> None:
    from pocl_dist.config.checks import check_config

    with pytest.raises(ConfigError, match=r"log\.mlflow_uri: no user or password") as caught:
        check_config(config_of(tmp_path, mlflow_uri="https://me:hunter2@host/"))
    assert "hunter2" not in str(caught.value)


def test_trackers_get_every_config_value_but_not_how_jobs_are_started(tmp_path: Path) -> None:
    values = tracked_config(config_of(tmp_path))
    assert values["optimizer.learning_rate"] == 1e-4
    assert values["models.student.path"] == "student"
    assert not any(key.startswith("launch") for key in values)


def test_numbers_of_a_list_have_names_of_their_own_and_words_have_none() -> None:
    line = {
        "kind": "quarters",
        "step": 4,
        "rouge_l": [1.5, None, 2.5],
        "names": ["a"],
        "seconds": 2,
    }
    row = row_of(line)
    assert (row.kind, row.step) == ("quarters", 4)
    assert row.values == {"rouge_l_1": 1.5, "rouge_l_3": 2.5, "seconds": 2.0}
