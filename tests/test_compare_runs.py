"""The runs of a comparison: shared files, states, what is trained next, what a table leaves out."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pocl_dist.cli import main
from pocl_dist.config import load_config, replaced
from pocl_dist.errors import DivergedError, MismatchError, StoppedError, WorkerError
from pocl_dist.files import atomic_write_json, atomic_write_text, read_json
from pocl_dist.pipeline import compare as compare_step
from pocl_dist.pipeline.comparison import death_signal
from pocl_dist.pipeline.comparison.children import cores_of, last_words
from pocl_dist.pipeline.comparison.folders import ComparedRun
from pocl_dist.pipeline.comparison.request import CompareRequest
from pocl_dist.pipeline.comparison.rounds import Comparison, needs_training
from pocl_dist.pipeline.comparison.shared import link_shared, shared_config
from pocl_dist.pipeline.comparison.tables import markdown
from pocl_dist.pipeline.comparison.tabulate import tabulate
from pocl_dist.pipeline.manifest import write_manifest
from pocl_dist.pipeline.plan import make_plan
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.pipeline.run_lock import run_lock
from pocl_dist.pipeline.verify import find_changes
from tests.comparing import (
    answer_run,
    base_config,
    chosen,
    comparison_of,
    make_shared_files,
    plan_run,
    train_run,
    with_keys,
)

REQUEST = CompareRequest(("forward_kl",), (1, 2))
SCORES = {"test1": [0.1, 0.2, 0.3, 0.4]}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Returns a comparison of four arms and two seeds whose runs are all there."""
    base = base_config(tmp_path_factory.mktemp("template"))
    make_shared_files(base)
    comparison = comparison_of(base, REQUEST)
    for arm in comparison.arms:
        for seed in (1, 2):
            answer_run(comparison, chosen(comparison, arm.name, seed), SCORES)
    return comparison


@pytest.fixture
def finished(template: Comparison, tmp_path: Path) -> Comparison:
    """Returns a copy of it, to be spoilt."""
    shutil.copytree(template.run.root, tmp_path / "run")
    return comparison_of(replaced(template.base, {"run_dir": str(tmp_path / "run")}), REQUEST)


# ------------------------------------------------------------------------------------ shared files


def test_a_run_gets_links_of_what_it_needs_and_nothing_else(tmp_path: Path) -> None:
    base = base_config(tmp_path)
    shared = make_shared_files(base)
    comparison = comparison_of(base, REQUEST)
    expected = {
        "sft": set(),
        "seqkd": {"generated"},
        "forward_kl-kd": set(),
        "forward_kl-pocl": {"difficulty"},
    }
    for name, folders in expected.items():
        compared = chosen(comparison, name, 1)
        link_shared(base, compared, comparison.counts)
        found = {path.name for path in compared.run.root.iterdir()} if folders else set()
        assert found == folders
        make_plan(compared.config, compared.run)  # checks what it was given
    linked = chosen(comparison, "forward_kl-pocl", 1).run.difficulty
    assert (linked / "shard-00000.parquet").samefile(shared.difficulty / "shard-00000.parquet")
    assert not (linked / "ranking.parquet").samefile(shared.difficulty / "ranking.parquet")


def test_a_run_that_writes_its_ranking_or_rows_anew_leaves_the_shared_files_alone(
    tmp_path: Path,
) -> None:
    base = base_config(tmp_path)
    shared = make_shared_files(base)
    comparison = comparison_of(base, REQUEST)
    compared = chosen(comparison, "forward_kl-pocl", 1)
    plan_run(comparison, compared)
    before = (shared.difficulty / "summary.json").read_bytes()
    atomic_write_json(compared.run.difficulty / "summary.json", {"num_examples": 0})
    assert (shared.difficulty / "summary.json").read_bytes() == before
    assert find_changes(shared.root) == []


def test_a_run_refuses_shared_scores_of_another_config(tmp_path: Path) -> None:
    base = base_config(tmp_path)
    make_shared_files(base)
    comparison = comparison_of(base, REQUEST)
    other = with_keys(chosen(comparison, "forward_kl-pocl", 1), data__template="alpaca")
    link_shared(base, other, comparison.counts)
    with pytest.raises(MismatchError, match=r"data\.template: it was made with 'short', now"):
        make_plan(other.config, other.run)


def test_the_shared_files_of_another_config_are_refused_as_a_whole(tmp_path: Path) -> None:
    base = base_config(tmp_path)
    make_shared_files(base)
    from pocl_dist.pipeline.probes import resumed_results

    resumed_results(shared_config(base))
    other = replaced(base, {"data.max_tokens": 60})
    with pytest.raises(MismatchError, match=r"data\.max_tokens 64, now 60"):
        resumed_results(shared_config(other))


def test_a_cache_of_one_order_of_rows_is_that_of_another(tmp_path: Path) -> None:
    from pocl_dist.models.sources import ModelFolder
    from pocl_dist.pipeline.cache_inputs import cache_inputs
    from pocl_dist.pipeline.inputs import read_train
    from pocl_dist.records import EncodedExample, Plan

    base = replaced(base_config(tmp_path), {"teacher.source": "cache_hidden"})
    rows, teacher = read_train(base), ModelFolder(tmp_path / "teacher", "teacher")
    encoded = [EncodedExample(f"row-{i}", (1, 2, i), 1, False, False) for i in range(5)]

    def digest(examples: list[EncodedExample]) -> object:
        inputs = cache_inputs(base, rows, Plan((), ()), teacher, examples)
        return inputs["data.train tokens sha256"]

    assert digest(encoded) == digest(encoded[::-1])
    assert digest(encoded) != digest(encoded[1:])
    others = [EncodedExample(f"row-{i}", (1, 3, i), 1, False, False) for i in range(5)]
    assert digest(encoded) != digest(others)


# -------------------------------------------------------------------------------------- the states


def _missing(comparison: Comparison, compared: ComparedRun) -> None:
    shutil.rmtree(compared.run.root)


def _unfinished(comparison: Comparison, compared: ComparedRun) -> None:
    shutil.rmtree(compared.run.root)
    plan_run(comparison, compared).write_status("running", None, "distill")


def _diverged(comparison: Comparison, compared: ComparedRun) -> None:
    _unfinished(comparison, compared)
    compared.run.write_status("failed", 76, "distill", "step 7: the loss is not finite")


def _lost(comparison: Comparison, compared: ComparedRun) -> None:
    _unfinished(comparison, compared)
    compared.run.write_status("failed", 71, "distill", "rank 1 was lost")


def _unanswered(comparison: Comparison, compared: ComparedRun) -> None:
    shutil.rmtree(compared.run.root)
    train_run(comparison, compared)


def _other_loss(comparison: Comparison, compared: ComparedRun) -> None:
    shutil.rmtree(compared.run.root)
    answer_run(comparison, with_keys(compared, loss__temperature_scaling="none"), SCORES)


def _other_student(comparison: Comparison, compared: ComparedRun) -> None:
    marker = compared.run.export / "pocl_dist.json"
    atomic_write_json(marker, {**read_json(marker), "digest.student": "0" * 64})


def _other_test_rows(comparison: Comparison, compared: ComparedRun) -> None:
    record = compared.run.eval / "test1" / "inputs.json"
    atomic_write_json(record, {**read_json(record), "data.eval test1 sha256": "0" * 64})


def _damaged(comparison: Comparison, compared: ComparedRun) -> None:
    compared.run.status.write_text("{")


CASES: dict[str, tuple[Callable[[Comparison, ComparedRun], None], str, bool]] = {
    "missing: it was not started": (_missing, "", True),
    "unfinished: ended early in distill": (_unfinished, "", True),
    "failed: step 7: the loss is not finite": (_diverged, "", False),
    "failed: rank 1 was lost": (_lost, "", True),
    "trained: test set test1 is not answered yet": (_unanswered, "", False),
    "mixed: checkpoints/, export/ was made with loss.temperature_scaling 'none'": (
        _other_loss,
        "",
        False,
    ),
    "was made with other digest.student than now": (_other_student, "mixed", False),
    "was answered with other rows than now": (_other_test_rows, "mixed", False),
    "damaged, or not written by pocl_dist": (_damaged, "mixed", False),
}


@pytest.mark.parametrize("words", CASES)
def test_what_is_missing_half_finished_or_mixed_is_named_and_the_rest_goes_on(
    finished: Comparison, words: str
) -> None:
    comparison = finished
    spoil, state, is_trained_again = CASES[words]
    victim = chosen(comparison, "forward_kl-pocl", 2)
    spoil(comparison, victim)
    comparison.forget(victim)
    assert needs_training(comparison.look(victim)) == is_trained_again
    value = tabulate(comparison, REQUEST.to_json())
    assert value["is_complete"] is False
    (mark,) = value["marks"]  # type: ignore[misc]
    assert str(mark).startswith("forward_kl-pocl, seed 2: ")
    assert words in str(mark) and state in str(mark)
    arms = {row["name"]: row for row in value["arms"]}  # type: ignore[union-attr,index,call-overload]
    assert (arms["sft"]["num_seeds"], arms["forward_kl-pocl"]["num_seeds"]) == (2, 1)  # type: ignore
    difference = value["differences"][0]  # type: ignore[index]
    assert (difference["num_seeds"], difference["is_complete"]) == (1, False)  # type: ignore
    text = markdown(value)
    assert "| forward_kl | KD + POCL | 120 | 0.001 | 25.00 * |" in text
    assert f"- {mark}" in text


def test_an_arm_without_any_run_leaves_a_line_without_figures(finished: Comparison) -> None:
    comparison = finished
    for seed in (1, 2):
        victim = chosen(comparison, "sft", seed)
        _diverged(comparison, victim)
        comparison.forget(victim)
    value = tabulate(comparison, REQUEST.to_json())
    text = markdown(value)
    assert "| SFT |  | 120 | 0.001 | – |" in text
    assert "| forward_kl | KD + POCL | 120 | 0.001 | 25.00 ± 0.00 |" in text
    with pytest.raises(DivergedError, match="the table lacks runs: sft, seeds 1, 2: failed"):
        compare_step.raise_missing(comparison, value)


def test_a_cause_that_may_pass_is_the_one_that_is_told(finished: Comparison) -> None:
    comparison = finished
    for name, spoil in (("sft", _diverged), ("seqkd", _lost)):
        spoil(comparison, chosen(comparison, name, 1))
        comparison.forget(chosen(comparison, name, 1))
    with pytest.raises(WorkerError, match="rank 1 was lost"):
        compare_step.raise_missing(comparison, tabulate(comparison, REQUEST.to_json()))
    missing = chosen(comparison, "seqkd", 1)
    _missing(comparison, missing)
    comparison.forget(missing)
    _missing(comparison, chosen(comparison, "sft", 1))
    comparison.forget(chosen(comparison, "sft", 1))
    with pytest.raises(StoppedError):  # 75: the same command goes on
        compare_step.raise_missing(comparison, tabulate(comparison, REQUEST.to_json()))


TWO_RATES = CompareRequest(("forward_kl",), (1,), (1e-3, 1e-1))


def _with_two_rates(tmp_path: Path) -> Comparison:
    """Returns a comparison whose runs with the smaller rate are done; the others are not begun."""
    base = base_config(tmp_path)
    make_shared_files(base)
    comparison = comparison_of(base, TWO_RATES)
    for arm in comparison.arms:
        answer_run(comparison, comparison.compared(arm, 1e-3, 1), SCORES, dev=(10.0,))
    return comparison


def test_a_diverged_learning_rate_is_no_candidate_and_does_not_spoil_the_arm(
    tmp_path: Path,
) -> None:
    comparison = _with_two_rates(tmp_path)
    for arm in comparison.arms:
        _diverge_first(comparison, comparison.compared(arm, 1e-1, 1))
    value = tabulate(comparison, TWO_RATES.to_json())
    assert value["is_complete"] is True
    assert "sft, learning rate 0.1: failed: step 7: the loss is not finite" in value["marks"]  # type: ignore


def test_a_learning_rate_that_was_lost_is_left_out_and_the_scheduler_is_told(
    tmp_path: Path,
) -> None:
    comparison = _with_two_rates(tmp_path)
    for arm in comparison.arms:
        train_run(comparison, comparison.compared(arm, 1e-1, 1), dev=(5.0,))
    victim = comparison.compared(comparison.arms[0], 1e-1, 1)
    _lost(comparison, victim)
    comparison.forget(victim)
    assert comparison.chosen_rate(comparison.arms[0]) == 1e-3
    value = tabulate(comparison, TWO_RATES.to_json())
    assert value["is_complete"] is False
    with pytest.raises(WorkerError, match=r"sft, learning rate 0\.1: failed: rank 1 was lost"):
        compare_step.raise_missing(comparison, value)


def _diverge_first(comparison: Comparison, compared: ComparedRun) -> None:
    plan_run(comparison, compared).write_status(
        "failed", 76, "distill", "step 7: the loss is not finite"
    )
    comparison.forget(compared)


# ----------------------------------------------------------------------------------------- verify


def test_verify_looks_at_every_run_and_at_what_the_table_was_made_from(
    finished: Comparison,
) -> None:
    comparison = finished
    root = comparison.run.root
    for arm in comparison.arms:  # models here have no weights to hash: the chain needs none
        for seed in (1, 2):
            shutil.rmtree(chosen(comparison, arm.name, seed).run.eval)
            run = chosen(comparison, arm.name, seed).run
            shutil.rmtree(run.export)
            write_manifest(run.root)
    value = read_json(_written(comparison))
    comparison.run.write_config(comparison.base)
    write_manifest(root)
    comparison.run.write_status("done", 0, "compare")
    assert find_changes(root) == []
    victim = chosen(comparison, "forward_kl-kd", 2).run
    victim.metrics.write_text("{}\n")
    name = victim.root.relative_to(root).as_posix()
    assert [line for line in find_changes(root) if line.startswith(f"{name}/metrics.jsonl")]
    write_manifest(victim.root)  # sealed anew
    assert f"comparison.json: is not about {name} as it is; run `pocl-dist compare` again" in (
        find_changes(root)
    )
    (root / "runs" / "stray.txt").touch()
    assert "runs/stray.txt: belongs to no run" in find_changes(root)
    atomic_write_json(root / "comparison.json", {**value, "target_visits": 1})
    assert any("its digest differs" in line for line in find_changes(root))


def _written(comparison: Comparison) -> Path:
    """Writes a table over the runs as they now are, whatever they lack."""
    from pocl_dist.files import digest_of, sha256_file

    value = tabulate(comparison, REQUEST.to_json())
    value.pop("digest")
    for arm in value["arms"]:  # type: ignore[union-attr]
        for row in arm["runs"]:  # type: ignore[index,call-overload,union-attr]
            row["manifest_sha256"] = sha256_file(  # type: ignore[index,call-overload]
                comparison.run.root / row["run"] / "manifest.json"  # type: ignore
            )
    path = comparison.run.root / "comparison.json"
    atomic_write_json(path, {**value, "digest": digest_of(value)})
    return path


# ------------------------------------------------------------------------- locks, children, words


def test_a_run_inside_another_keeps_its_own_lock_and_neither_fences_the_other(
    tmp_path: Path,
) -> None:
    outer, inner = tmp_path / "outer", tmp_path / "outer" / "runs" / "inner"
    with run_lock(inner):
        pass  # attempts of the two differ
    with run_lock(outer), run_lock(inner):
        atomic_write_text(inner / "file", "x")
        atomic_write_text(outer / "file", "x")
        (outer / "lock").unlink()
        with pytest.raises(WorkerError, match="nobody holds its lock"):
            atomic_write_text(outer / "other", "x")


def test_a_training_is_asked_to_save_when_the_comparison_is_killed(tmp_path: Path) -> None:
    child = "import signal, sys, time, pathlib\n" + (
        "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path('saved').touch(), sys.exit(75)))\n"
        "pathlib.Path('ready').touch()\n"
        "time.sleep(60)\n"
    )
    parent = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-I', '-S', {death_signal.__file__!r},"
        f" str(os.getpid()), sys.executable, '-c', {child!r}], start_new_session=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path)
    _wait_for(tmp_path / "ready")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _wait_for(tmp_path / "saved")


def test_a_training_does_not_start_when_the_comparison_is_gone_already() -> None:
    words = ["-I", "-S", death_signal.__file__, "1", sys.executable, "-c", "raise SystemExit(3)"]
    assert subprocess.run([sys.executable, *words]).returncode == 75


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.02)


def test_trainings_at_once_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3, 4, 6, 7})
    assert cores_of(0, 1) == {1, 3, 4, 6, 7}
    assert [cores_of(slot, 2) for slot in range(2)] == [{1, 4, 7}, {3, 6}]
    assert cores_of(5, 6) == {1, 3, 4, 6, 7}, "more trainings than cores"


def test_the_last_words_of_a_log_are_its_last_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_words(log) == ""
    log.write_text("x" * 9000 + "\nfirst\npocl-dist run: the disk is full\n\n")
    assert last_words(log) == "pocl-dist run: the disk is full"


WORDS = {
    "--methods: unknown 'forward'; did you mean": ["--methods", "forward", "--seeds", "1"],
    "--seeds: '' has an empty entry": ["--methods", "forward_kl", "--seeds", ""],
    "--seeds: 3 is given twice": ["--methods", "forward_kl", "--seeds", "3,1,3"],
    "--seeds: '-1' is not allowed": ["--methods", "forward_kl", "--seeds=-1"],
    "--seeds: write 1, not '01'": ["--methods", "forward_kl", "--seeds", "01"],
    "--methods: gkd is given twice": ["--methods", "gkd,gkd", "--seeds", "1"],
    "--ablate: unknown 'orders'; did you mean 'order'": [
        "--methods", "gkd", "--seeds", "1", "--ablate", "orders",
    ],
    "--lr-grid: 0 is not allowed": ["--methods", "gkd", "--seeds", "1", "--lr-grid", "1e-3,0"],
    "--lr-grid: 'x' is no number": ["--methods", "gkd", "--seeds", "1", "--lr-grid", "x"],
    "--lr-grid: nan is not allowed": ["--methods", "gkd", "--seeds", "1", "--lr-grid", "nan"],
    "--jobs: 0 is not allowed": ["--methods", "gkd", "--seeds", "1", "--jobs", "0"],
}  # fmt: skip


@pytest.mark.parametrize("message", WORDS)
def test_a_wrong_command_line_is_refused_before_the_config_is_read(
    message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["compare", "no_such.yaml", *WORDS[message]])
    assert caught.value.code == 2
    assert message in capfd.readouterr().err


def test_a_config_without_teacher_ends_with_64_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POCL_DIST_PARENT", "")
    run_dir = tmp_path / "run"
    words = ["tiny_cpu.yaml", f"run_dir={run_dir}", "models.teacher=null"]
    with pytest.raises(SystemExit) as caught:
        main(["compare", *words, "--methods", "forward_kl", "--seeds", "1"])
    assert caught.value.code == 64
    assert "models.teacher: null, but all arms but SFT" in capfd.readouterr().err
    assert not (run_dir / "runs").exists() and not (run_dir / "shared").exists()


def test_the_default_grid_is_the_config_s_own_rate() -> None:
    from pocl_dist.pipeline.comparison.rates import grid_of

    config = load_config(["tiny_cpu.yaml"], ["data.dev=null"])
    assert grid_of(config, ()) == (config.optimizer.learning_rate,)
    assert grid_of(config, (0.5,)) == (0.5,)


def test_a_run_directory_of_a_comparison_is_none_of_a_run(finished: Comparison) -> None:
    comparison = finished
    run = RunDirectory(Path(shared_config(comparison.base).run_dir))
    assert run.root == comparison.run.root / "shared"
    assert chosen(comparison, "sft", 2).run.root == (
        comparison.run.root / "runs" / "sft" / "lr-0.001" / "seed-2"
    )
