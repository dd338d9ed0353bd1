"""What a person or a program sees of a run: bars, lines, JSON, and how long it will take."""

from __future__ import annotations

import io
import json
import os
import pty
import random
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from pocl_dist.cli import main
from pocl_dist.display import output
from pocl_dist.display.eta import SmoothedRate, StepClock, duration
from pocl_dist.display.rows import RowProgress
from pocl_dist.display.training import TrainingDisplay
from tests.tiny import write_config

ROW = {"temperature": 1.33, "kd_ratio": 0.8, "loss": 2.0, "tokens_per_second": 1234.0}


def test_the_rate_of_steady_work_is_exact_from_the_first_unit_on() -> None:
    rate = SmoothedRate(half_life=20)
    assert rate.seconds_per_unit is None
    for _ in range(3):
        rate.add(7, 3.5)
        assert rate.seconds_per_unit == pytest.approx(0.5, rel=1e-12)
        assert rate.units_per_second == pytest.approx(2.0, rel=1e-12)


def simulated(costs: list[float], dev_every: int, dev_seconds: float) -> list[float]:
    """Returns for every step of two equal stages the ratio of predicted to true time left."""
    half = len(costs) // 2
    clock, now, ratios = StepClock([half, half]), 100.0, []
    ends = []
    for number, cost in enumerate(costs, start=1):
        now += cost
        ends.append(now)
        if number % dev_every == 0:
            now += dev_seconds
    for index, cost in enumerate(costs[:-1]):
        clock.add(cost, ends[index])
        stage, in_stage = divmod(index + 1, half)
        left = clock.remaining(min(stage, 1), in_stage if stage < 2 else half)
        assert left.num_steps == len(costs) - index - 1
        assert left.seconds is not None
        ratios.append(left.seconds / (now - ends[index]))
    return ratios


def test_the_eta_is_exact_for_equal_steps() -> None:
    assert simulated([0.5] * 40, dev_every=1000, dev_seconds=0.0) == pytest.approx([1.0] * 39)


def test_the_eta_follows_when_a_stage_s_steps_cost_three_times_as_much() -> None:
    ratios = simulated([0.2] * 200 + [0.6] * 200, dev_every=1000, dev_seconds=0.0)
    assert ratios[60] < 0.6  # nobody can know of the later stage
    # A mean over all steps would be a fifth too low here.
    assert all(0.9 < ratio < 1.1 for ratio in ratios[262:390])


def test_the_eta_holds_with_noise_and_with_dev_passes_between_the_steps() -> None:
    draw = random.Random(0)
    costs = [draw.uniform(0.1, 0.3) for _ in range(400)]
    ratios = simulated(costs, dev_every=20, dev_seconds=3.0)  # as long again as the steps
    assert all(0.75 < ratio < 1.2 for ratio in ratios[100:350])  # to one dev pass


def test_waits_are_told_as_people_say_them() -> None:
    cases = {0.4: "0 s", 59.4: "59 s", 59.6: "1:00", 3599: "59:59", 11525: "3:12:05"}
    assert {seconds: duration(seconds) for seconds in cases} == cases
    assert (duration(190000), duration(None)) == ("2 d 4 h", "?")


def test_outside_a_terminal_the_display_prints_every_few_steps(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with TrainingDisplay([2, 3], every=2).live() as display:
        for step in range(1, 6):
            stage = int(step > 2)
            display.step({**ROW, "step": step, "stage": stage}, step - 2 * stage, 0.5)
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in out] == ["2/5", "4/5", "5/5"]
    assert out[1].startswith("step 4/5 stage 2/2 T=1.33 ratio=0.80 loss=2.0000 1234 tok/s ETA ")
    assert out[0].endswith(" (stage 0 s)") and "(stage " in out[1]


def test_a_stage_that_ends_early_shortens_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    display = TrainingDisplay([10, 10], every=1)
    display.step({**ROW, "step": 4, "stage": 0}, 4, 0.5)
    display.step({**ROW, "step": 5, "stage": 1}, 1, 0.5)  # the first stage had converged
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["4/20", "5/14"]


@pytest.mark.parametrize(
    ("width", "encoding"),
    [(80, "utf-8"), (80, "ascii"), (40, "utf-8"), (40, "ascii"), (20, "utf-8")],
)
def test_the_live_display_fits_into_the_terminal_whatever_it_can_show(
    width: int, encoding: str
) -> None:
    display = TrainingDisplay([300, 900], every=1000)
    display.step({**ROW, "step": 123, "stage": 0}, 123, 0.5)
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    Console(file=file, width=width, force_terminal=True, color_system=None).print(display)
    rows = RowProgress("measure", 12345, 11000)
    Console(file=file, width=width, force_terminal=True, color_system=None).print(rows)
    file.flush()
    shown = raw.getvalue().decode(encoding).splitlines()
    assert len(shown) == 4 and all(len(line) <= width for line in shown)
    if width == 80:
        assert "stage 1/2" in shown[0] and "123/300" in shown[0] and "ETA 1:28" in shown[0]
        assert "123/1200" in shown[1] and "ETA 8:58" in shown[1]
        assert "T=1.33 ratio=0.80 loss=2.0000 1234 tok/s" in shown[2]
        full, empty = ("━", "─") if encoding == "utf-8" else ("#", "-")
        assert all(full in line and empty in line for line in (*shown[:2], shown[3]))
    if width >= 40:
        assert "123/1200 ETA" in shown[1] and shown[3].startswith("measure ")
        assert "11000/12345 rows" in shown[3]


def test_rows_are_told_with_speed_tokens_and_eta(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("pocl_dist.display.rows.time.monotonic", lambda: now)
    with RowProgress("measure", 40) as progress:
        for _ in range(4):
            now += 5.0
            progress.advance(10, 1000)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "measure: 10/40 rows"  # until here the models were loaded
    assert lines[1] == "measure: 20/40 rows, 2.0 rows/s, 200 tok/s, ETA 10 s"
    assert lines[-1] == "measure: 40/40 rows, 2.0 rows/s, 200 tok/s, ETA 0 s"


def command(*words: str) -> int:
    """Runs a command line in this process; returns its exit code."""
    with pytest.raises(SystemExit) as end:
        main(words)
    return int(str(end.value.code))


def test_json_is_all_that_stdout_holds_and_its_last_line_states_the_outcome(
    tiny_pair: tuple[Path, Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = str(write_config(tmp_path, *tiny_pair))
    assert command("plan", "--json", config) == 0
    out, err = capfd.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert rows[0]["event"] == "note" and rows[0]["text"].startswith("plan: ")
    assert rows[-1].pop("time") > 1e9
    assert rows[-1] == {
        "event": "outcome",
        "command": "plan",
        "exit_code": 0,
        "outcome": "done",
        "retryable": False,
        "reason": "",
    }
    assert "temperature" in err  # the table for people
    assert command("plan", "--json", config, "curriculum.num_stages=-1") == 64
    out, err = capfd.readouterr()
    (last,) = map(json.loads, out.splitlines())
    assert (last["exit_code"], last["outcome"]) == (64, "config")
    assert "curriculum.num_stages" in last["reason"] and last["reason"] in err
    print("stdout is back")
    assert capfd.readouterr().out == "stdout is back\n"


def test_quiet_prints_nothing_but_warnings_and_errors(
    tiny_pair: tuple[Path, Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = str(write_config(tmp_path, *tiny_pair))
    assert command("plan", "--quiet", config, "engine.global_batch_size=48") == 0
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("warning: stage 1 has 12 rows")
    assert command("plan", "--quiet", config, "curriculum.num_stages=-1") == 64
    out, err = capfd.readouterr()
    assert out == "" and "curriculum.num_stages" in err
    assert command("plan", "--quiet", "--json", config) == 2


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_leaves_ends_nothing(
    tiny_pair: tuple[Path, Path, Path], tmp_path: Path, options: list[str]
) -> None:
    words = ["plan", *options, str(write_config(tmp_path, *tiny_pair))]
    process = subprocess.Popen(
        [sys.executable, "-m", "pocl_dist", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(60) == 0, process.stderr.read()
    process.stderr.close()


def test_letters_that_stdout_does_not_know_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with output.kept():
        output.say("größe → 3")
    assert raw.getvalue() == b"gr\\xf6\\xdfe \\u2192 3\n"


def test_json_lines_of_ranks_are_handed_on_and_what_else_they_print_goes_to_stderr(
    capfd: pytest.CaptureFixture[str],
) -> None:
    code = """print('{"event": "step", "step": 1}'); print("[INFO] launcher")"""
    with output.kept():
        output.use("json")
        with subprocess.Popen([sys.executable, "-c", code], stdout=output.for_child()) as child:
            output.relay_of(child.stdout).join(30)
    out, err = capfd.readouterr()
    assert (out, err) == ('{"event": "step", "step": 1}\n', "[INFO] launcher\n")


DRAW = """
import os, sys, time
from pocl_dist.display import output
from pocl_dist.display.training import TrainingDisplay

row = {"temperature": 1.0, "kd_ratio": 0.7, "loss": 2.0, "tokens_per_second": 100.0}
display = TrainingDisplay([5, 5], every=2)
with output.kept(), display.live():
    for step in range(1, 8):
        display.step({**row, "step": step, "stage": (step - 1) // 5}, (step - 1) % 5 + 1, 0.1)
    output.say("between the bars")
    raise KeyboardInterrupt
"""


@pytest.mark.parametrize("kind", ["xterm", "dumb"])
def test_on_a_terminal_bars_are_drawn_and_an_interrupt_leaves_it_sane(kind: str) -> None:
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", DRAW],
        stdout=terminal, stderr=subprocess.DEVNULL,
        env={**os.environ, "TERM": kind, "COLUMNS": "80", "NO_COLOR": "1"},
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    try:
        while chunk := os.read(controller, 4096):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    process.wait(30)
    os.close(controller)
    text = shown.decode()
    assert "between the bars" in text
    assert "\x1b[?25l" not in text  # the cursor never goes away
    assert "\x1b[3" not in text  # no colour
    if kind == "dumb":
        assert "step 2/10" in text and "\x1b" not in text
    else:
        assert "stage 2/2" in text and "7/10" in text
        assert text.endswith("\r\n")
