"""The jobs of `pocl-dist launch --target ray`, with a stand-in for `ray job`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pocl_dist.cluster.launch import write_files
from pocl_dist.cluster.launch_plan import LaunchPlan, make_plan
from pocl_dist.cluster.targets import ray
from pocl_dist.errors import ConfigError, UnavailableError
from tests.test_launch_slurm import put

# Stands for the interpreter: `ray job submit` runs a step that ends with the next line of `codes`,
# `ray job status` knows only "succeeded" and "failed", `pocl_dist outcome` tells the code.
PYTHON = """
here=$(dirname "$0")
case "$*" in
*"job submit"*)
    echo "$*" >>"$here/submitted"
    code=$(head -n 1 "$here/codes"); sed -i 1d "$here/codes"
    [ "$code" = dead ] || echo "$code" | tee "$here/code" >"$RUN_DIR/status.json"
    echo $RANDOM >>"$RUN_DIR/status.json"
    ;;
*"job status"*)
    [ "$(cat "$here/code")" = 0 ] && end=succeeded || end=failed
    echo "Job '$7' $end"
    ;;
*outcome*) exit "$(cat "$here/code")" ;;
esac
"""
STEPS = ["measure", "plan", "distill", "evaluate", "report"]


@pytest.fixture(autouse=True)
def no_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the script ask for a job's state without a pause."""
    tools = put(tmp_path / "tools", "sleep", "").parent
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")


def make(tmp_path: Path, codes: str, *words: str) -> LaunchPlan:
    """Returns the plan of a run, its files written, whose jobs end with these codes."""
    python = put(tmp_path, "my python", PYTHON)
    (tmp_path / "codes").write_text("\n".join(codes.split()) + "\n")
    given = [
        f"run_dir={tmp_path}/it's a run",
        f"launch.python={python}",
        "launch.gpus_per_node=2",
        "launch.ray_job.address=http://127.0.0.1:1",
        "launch.ray_job.poll_seconds=1",
        *words,
    ]
    plan = make_plan(["configs/tiny_cpu.yaml", *given])
    write_files(Path(plan.folder), ray.render(plan))
    return plan


def submitted(tmp_path: Path) -> list[str]:
    return (tmp_path / "submitted").read_text().splitlines()


def test_steps_are_submitted_in_turn_and_retryable_ends_again(tmp_path: Path) -> None:
    plan = make(tmp_path, "0 0 75 0 0 0")
    ray.submit(plan, Path(plan.folder))
    calls = submitted(tmp_path)
    assert [call.split()[-1] for call in calls] == [*STEPS[:3], *STEPS[2:]]
    for call in calls:
        assert "--no-wait" in call
        assert "--address http://127.0.0.1:1" in call
        assert ("--entrypoint-num-gpus 2" in call) is call.endswith("distill")


def test_another_end_is_the_end(tmp_path: Path) -> None:
    plan = make(tmp_path, "0 64 0")
    with pytest.raises(ConfigError, match="64"):
        ray.submit(plan, Path(plan.folder))
    assert len(submitted(tmp_path)) == 2


def test_attempts_are_counted(tmp_path: Path) -> None:
    plan = make(tmp_path, "69 69 69 0", "launch.ray_job.max_resubmits=1")
    with pytest.raises(UnavailableError):
        ray.submit(plan, Path(plan.folder))
    assert len(submitted(tmp_path)) == 2


def test_without_an_address_nothing_is_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    plan = make(tmp_path, "0", "launch.ray_job.address=null")
    with pytest.raises(ConfigError, match="64"):
        ray.submit(plan, Path(plan.folder))
    assert not (tmp_path / "submitted").exists()


def test_ranks_on_several_nodes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"launch\.nodes: 2"):
        make(tmp_path, "0", "launch.nodes=2", "engine.world_size=4")


def test_the_passes_use_the_cluster_that_runs_the_job(tmp_path: Path) -> None:
    plan = make(tmp_path, "0")
    assert "address: auto" in ray.render(plan)["config.yaml"]
    own = make(tmp_path / "own", "0", "ray.address=10.0.0.1:6379")
    assert "address: 10.0.0.1:6379" in ray.render(own)["config.yaml"]
    assert os.path.isabs(plan.folder)
