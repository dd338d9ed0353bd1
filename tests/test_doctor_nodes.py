"""doctor on several nodes: real processes that meet in a folder, a real all-reduce over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pocl_dist.cluster.doctor.checks.devices import judged
from pocl_dist.cluster.doctor.checks.nodes import NodeOfJob, is_main_process, node_of_job
from pocl_dist.cluster.doctor.probing import all_reduce_here
from pocl_dist.errors import WorkerError

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE")


def start(run_dir: Path, index: int, *words: str) -> subprocess.Popen[str]:
    """Starts doctor as node `index` of two, as srun would."""
    environment = {name: v for name, v in os.environ.items() if name not in LAUNCHERS}
    environment |= {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_NODEID": str(index),
        "SLURM_LOCALID": "0",
        "CUDA_VISIBLE_DEVICES": "",
    }
    few = ["data.limit=100", "data.dev=null", "data.eval=[]", f"run_dir={run_dir}"]
    line = [sys.executable, "-m", "pocl_dist", "doctor", "tiny_cpu.yaml", *few, "--json", *words]
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def about_nodes(out: str) -> list[dict[str, str]]:
    return [f for f in json.loads(out)["findings"] if f["check"] == "other nodes"]


def test_two_nodes_that_see_one_folder_meet_and_leave_nothing(tmp_path: Path) -> None:
    nodes = [start(tmp_path / "run", index) for index in range(2)]
    (out, _), (other_out, other_err) = (node.communicate(timeout=60) for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0]
    (finding,) = about_nodes(out)
    assert finding["severity"] == "ok"
    assert finding["what"].startswith(f"all 2 nodes see {tmp_path}: ")
    assert (other_out, other_err) == ("", "")  # the first one prints for all
    assert list(tmp_path.iterdir()) == []


def test_nodes_that_see_two_folders_of_one_name_are_69_on_both(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    nodes = [start(tmp_path / "ab"[index] / "run", index, "--wait", "1") for index in range(2)]
    (out, _), (_, err) = (node.communicate(timeout=60) for node in nodes)
    assert [node.returncode for node in nodes] == [69, 69]
    (finding,) = about_nodes(out)
    assert "1 of 2 nodes were seen there within 1 s" in finding["what"]
    assert "node 1 was not" in finding["what"] and finding["why"] and finding["how"]
    assert "doctor: other nodes: " in err and "node 0 was not" in err


@pytest.mark.parametrize(
    ("variables", "node"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NODEID": "0"}, None),  # the batch script, no srun
        (
            {
                "SLURM_JOB_ID": "7",
                "SLURM_STEP_ID": "1",
                "SLURM_STEP_NUM_NODES": "3",
                "SLURM_NODEID": "2",
            },
            NodeOfJob("slurm-7-1", 2, 3, True),
        ),
        (
            {
                "GROUP_RANK": "1",
                "LOCAL_WORLD_SIZE": "4",
                "WORLD_SIZE": "8",
                "LOCAL_RANK": "3",
                "TORCHELASTIC_RUN_ID": "x",
            },
            NodeOfJob("x--", 1, 2, False),
        ),
        ({"GROUP_RANK": "x", "LOCAL_WORLD_SIZE": "0", "WORLD_SIZE": "8"}, None),
    ],
)
def test_the_place_of_a_node_comes_from_srun_or_torchrun(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], node: NodeOfJob | None
) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")] + list(LAUNCHERS):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert node_of_job() == node
    assert is_main_process() == (node is None)


def test_an_all_reduce_over_two_real_ranks_is_right_and_timed() -> None:
    told = all_reduce_here(2, "cpu", megabytes=1)
    assert told["world_size"] == 2 and told["is_right"] is True
    speed, seconds = told["bytes_per_second"], told["seconds"]
    assert isinstance(speed, float) and isinstance(seconds, float)
    assert speed == pytest.approx((1 << 20) / seconds)  # 2 (n - 1) / n = 1 for two ranks
    assert judged({**told, "bytes_per_second": 2e11}).severity == "ok"
    assert judged({**told, "bytes_per_second": 1e8}).severity == "warning"
    wrong = judged({**told, "is_right": False})
    assert (wrong.severity, wrong.exit_code) == ("error", 71)


@pytest.mark.slow
def test_a_rank_that_fails_is_71_and_says_why() -> None:
    with pytest.raises(WorkerError, match=r"all-reduce on this machine: .*Error"):
        all_reduce_here(1, "nowhere", megabytes=1)
