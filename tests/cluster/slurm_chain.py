"""(c) Debian's Slurm with two virtual nodes runs the rendered chain of steps.

    python -m tests.cluster.slurm_chain [failing | chain]     (as root; about five minutes)

1. The chain of a tiny config, submitted by `pocl-dist launch --target slurm`, runs to its report.
2. The same chain, whose distill is preempted by another job, warned by USR1 as before its time
   limit, and put back into the queue by `scontrol requeue`, ends with the same losses, bit for bit;
   the later steps wait for it.
3. A step that fails with 64 ends the chain: the later steps are cancelled, nothing is repeated.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.cluster.slurm_cluster import PACKAGES, SlurmCluster

REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = (
    "configs/tiny_cpu.yaml",
    "data.limit=96",
    "data.dev_limit=16",
    "data.eval_limit=16",
    "curriculum.num_stages=2",
    "curriculum.visits_per_example=8",
    "checkpoint.every=3",
    "checkpoint.keep_last=100",
    "ray.shard_size=32",
    "ray.num_actors=2",
    "log.every=1",
    "launch.grace_seconds=20",
    "launch.slurm.time_limit=0:30:00",
)
STEPS = ("measure", "plan", "distill", "evaluate", "report")
SECONDS = 900.0


class Chain:
    """The jobs of one submitted run."""

    def __init__(self, cluster: SlurmCluster, run_dir: Path) -> None:
        self.cluster = cluster
        self.run_dir = run_dir
        self.jobs: dict[str, int] = {}

    def launch(self, *words: str) -> str:
        """Calls `pocl-dist launch` for two nodes and returns what it printed."""
        command = [sys.executable, "-m", "pocl_dist", "launch", "--target", "slurm", *WORDS]
        command += [f"run_dir={self.run_dir}", f"launch.python={sys.executable}"]
        return self.cluster.run(*command, "--nodes", "2", "--gpus-per-node", "0", *words)

    def submit(self) -> None:
        """Submits the chain and keeps the ids of its jobs."""
        self.keep(self.launch())

    def keep(self, printed: str) -> None:
        """Keeps the ids of the jobs from lines `STEP JOB_ID`."""
        self.jobs = {step: int(job) for step, job in map(str.split, printed.splitlines())}
        say(f"submitted: {self.jobs}")

    def field(self, step: str, name: str) -> str:
        """Returns what `scontrol show job` says of a step's job; empty when it is forgotten."""
        shown = self.cluster.run("scontrol", "show", "job", str(self.jobs[step]), check=False)
        words = [word for word in shown.split() if word.startswith(f"{name}=")]
        return words[0].partition("=")[2] if words else ""

    def states(self) -> dict[str, str]:
        """Returns the state of every step's job."""
        return {step: self.field(step, "JobState") for step in self.jobs}

    def wait(self, what: str, is_so: Callable[[], bool], seconds: float = SECONDS) -> None:
        """Returns when it is so; AssertionError with all states and logs when it never is."""
        ends = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < ends, f"{what}: not so; {self.states()}\n{self.log()}"
            time.sleep(0.5)

    def wait_for(self, step: str, *states: str) -> None:
        """Returns when a step's job is in one of the states."""
        failed = ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        def is_there() -> bool:
            state = self.field(step, "JobState")
            assert state in states or state not in failed, f"{step}: {state}\n{self.log()}"
            return state in states

        self.wait(f"{step} in {states}", is_there)

    def hurry(self, step: str) -> None:
        """Starts a job that was put back at once: Slurm lets it wait for two minutes."""
        job = str(self.jobs[step])
        self.wait(f"{step} waits", lambda: self.field(step, "JobState") == "PENDING", 300)
        self.cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)

    def log(self) -> str:
        """Returns the end of every job's log."""
        texts = []
        for path in sorted((self.run_dir / "launch" / "logs").rglob("*.*")):
            text = path.read_text(errors="replace") if path.is_file() else ""
            texts.append(f"--- {path}\n{text[-3000:]}")
        return "\n".join(texts)

    def rows(self, kind: str) -> list[dict[str, object]]:
        """Returns the lines of metrics.jsonl of a kind."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [row for row in map(json.loads, lines) if row["kind"] == kind]

    def checkpoint_steps(self) -> list[int]:
        """Returns the steps of the committed checkpoints."""
        found = (self.run_dir / "checkpoints").glob("step-*")
        return sorted(int(path.name.removeprefix("step-")) for path in found)


def say(line: str) -> None:
    """Prints a line with the time since the start."""
    print(f"[{time.monotonic() - STARTED:6.1f} s] {line}", flush=True)


STARTED = time.monotonic()


def check_undisturbed(cluster: SlurmCluster, folder: Path) -> Chain:
    """Runs the chain to its report; every step one job, on the nodes it asked for."""
    chain = Chain(cluster, folder / "undisturbed run's")
    chain.submit()
    assert tuple(chain.jobs) == STEPS
    for step in STEPS:
        chain.wait_for(step, "COMPLETED")
        say(f"{step}: COMPLETED on {chain.field(step, 'NodeList')}")
    assert chain.field("measure", "NumNodes") == "2"
    assert chain.field("plan", "NumNodes") == "1"
    assert (chain.run_dir / "report.json").exists()
    logs = (chain.run_dir / "launch/logs/measure.out").read_text()
    assert "Ray on 2 nodes" in logs, logs
    assert not list((chain.run_dir / "launch").glob("ray-*")), "a token was left behind"
    verify(chain.run_dir)
    return chain


def verify(run_dir: Path) -> None:
    """Checks the sealed manifest of a finished run."""
    command = [sys.executable, "-m", "pocl_dist", "verify", str(run_dir)]
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)


def check_disturbed(cluster: SlurmCluster, folder: Path, undisturbed: Chain) -> None:
    """Preempts distill, then puts it back by hand; compares its losses with the undisturbed ones.

    The difficulty pass and the plan are taken over: they are done, and their jobs find that out.
    """
    chain = Chain(cluster, folder / "disturbed")
    chain.run_dir.mkdir()
    shutil.copytree(undisturbed.run_dir / "difficulty", chain.run_dir / "difficulty")
    chain.submit()
    chain.wait_for("distill", "RUNNING")
    chain.wait("two steps", lambda: len(chain.rows("step")) >= 2)
    preempt = ["sbatch", "--parsable", "-p", "high", "-N2", "-J", "urgent", "--output=/dev/null"]
    urgent = cluster.run(*preempt, "--wrap", "srun -N2 sleep 3").strip()
    say(f"job {urgent} of a partition with priority wants both nodes")
    put_back(chain, 1, is_saved=True)
    say("USR1 to the batch script, as before a time limit")
    cluster.run("scancel", "--batch", "--signal=USR1", str(chain.jobs["distill"]))
    put_back(chain, 2, is_saved=True)
    say("scontrol requeue, without a warning")
    cluster.run("scontrol", "requeue", str(chain.jobs["distill"]))
    put_back(chain, 3, is_saved=False)
    for step in STEPS[2:]:
        chain.wait_for(step, "COMPLETED")
        say(f"{step}: COMPLETED, {chain.field(step, 'Restarts')} restarts")
    compare(chain, undisturbed)
    verify(chain.run_dir)


def put_back(chain: Chain, num_restarts: int, is_saved: bool) -> None:
    """Waits until distill is in the queue again; starts it at once, and waits for two steps."""
    chain.wait(
        f"distill is put back, restart {num_restarts}",
        lambda: chain.field("distill", "Restarts") == str(num_restarts),
        300,
    )
    num_steps, saved_at = len(chain.rows("step")), chain.checkpoint_steps()[-1]
    say(f"distill is in the queue again: {num_steps} steps done, saved at {saved_at}")
    assert not is_saved or saved_at == num_steps, "what was trained was not saved"
    waiting = {step: chain.field(step, "JobState") for step in ("evaluate", "report")}
    assert set(waiting.values()) == {"PENDING"}, waiting
    chain.hurry("distill")
    chain.wait("two more steps", lambda: len(chain.rows("step")) >= saved_at + 2)


def compare(chain: Chain, undisturbed: Chain) -> None:
    """Compares steps and losses of two runs, bit for bit."""
    found, wanted = chain.rows("step"), undisturbed.rows("step")
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    pairs = [(row["loss"], other["loss"]) for row, other in zip(found, wanted, strict=True)]
    assert all(loss == other for loss, other in pairs), pairs
    say(f"{len(found)} steps, all losses equal to the undisturbed run's")


def check_failing(cluster: SlurmCluster, folder: Path) -> None:
    """A config that is wrong on the cluster ends the chain with the first job."""
    chain = Chain(cluster, folder / "failing")
    printed = chain.launch("--render", str(folder / "files"))
    say(printed.strip())
    config = folder / "files" / "config.yaml"
    config.write_text(config.read_text().replace("learning_rate: 0.008", "learning_rate: -1.0"))
    chain.keep(cluster.run("bash", str(folder / "files" / "submit.sh")))
    chain.wait("measure has failed", lambda: chain.field("measure", "JobState") == "FAILED", 300)
    later = set(STEPS[1:])
    chain.wait(
        "the later steps are cancelled",
        lambda: all(chain.field(step, "JobState") == "CANCELLED" for step in later),
        300,
    )
    assert chain.field("measure", "ExitCode") == "64:0", chain.field("measure", "ExitCode")
    assert chain.field("measure", "Restarts") == "0"
    log = (folder / "files" / "logs" / "measure.out").read_text()
    assert "learning_rate" in log, log
    say(f"64 ends the chain: {chain.states()}")


def main() -> int:
    """Runs all parts, or those named on the command line; returns 0, or 77 where it cannot."""
    names = sys.argv[1:]
    missing = [name for name in ("slurmctld", "slurmd", "munged", "ip") if not shutil.which(name)]
    if os.geteuid() or missing:
        print(f"SKIPPED: needs root and {' '.join(PACKAGES)}; missing: {missing or 'root'}")
        return 77
    if REPOSITORY.is_relative_to("/tmp"):
        print(f"SKIPPED: {REPOSITORY}: every node has a /tmp of its own; clone it elsewhere")
        return 77
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is taken away
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    os.chdir(REPOSITORY)
    folder = Path(tempfile.mkdtemp(prefix="pocl-slurm-", dir="/var/tmp"))
    cluster = SlurmCluster(folder / "slurm", prefix=f"pocl{os.getpid()}")
    is_good = False
    try:
        cluster.start()
        say("Slurm: n1 and n2 are idle")
        if not names or "failing" in names:
            check_failing(cluster, folder)
        if not names or "chain" in names:
            undisturbed = check_undisturbed(cluster, folder)
            check_disturbed(cluster, folder, undisturbed)
        is_good = True
    finally:
        cluster.stop()
        if is_good:
            shutil.rmtree(folder)
        else:
            print(f"FAILED: logs are in {folder}", flush=True)
    say("slurm: as promised")
    return 0


if __name__ == "__main__":
    sys.exit(main())
