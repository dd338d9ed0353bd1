"""Distill over two hosts with `deepspeed --hostfile`; one is cut off; the job ends, then resumes.

python -m tests.cluster.deepspeed_hosts        (as root; about three minutes on two cores)
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pocl_dist.files import read_json, read_json_lines, sha256_file
from tests.cluster.hosts import PACKAGES as _HOST_PACKAGES
from tests.cluster.hosts import SSH_PORT, Hosts, why_not

PACKAGES = (*_HOST_PACKAGES, "pdsh")
REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 20  # engine.timeout_seconds
DEAD_LINK_SECONDS = 6
# Watchdog and its last words, the group's own limit behind it, a look at the hosts.
ENDS_WITHIN_SECONDS = TIMEOUT_SECONDS * 1.5 + 30 + 30
CUT_AFTER_STEP = 12


class Job:
    """One `pocl-dist distill` on the head, over the hosts."""

    def __init__(self, hosts: Hosts, folder: Path, run: str, *words: str) -> None:
        self.run = folder / run
        self.log = folder / f"{run}.log"
        overrides = {
            "run_dir": self.run,
            "data.limit": 96,
            "data.dev": "null",
            "curriculum.num_stages": 2,
            "curriculum.visits_per_example": 4,
            "curriculum.ordering": "shuffled",
            "checkpoint.every": 5,
            "checkpoint.keep_last": 50,
            "engine.timeout_seconds": TIMEOUT_SECONDS,
            "launch.ranks_with": "deepspeed",
            "launch.nodes": 2,
            "launch.gpus_per_node": 0,
            "launch.hostfile": folder / "hostfile",
            "launch.ssh_port": SSH_PORT,
            "launch.ssh_config": hosts.ssh_config,
            "launch.dead_link_seconds": DEAD_LINK_SECONDS,
            "launch.environment": "{GLOO_SOCKET_IFNAME: eth0}",
        }
        self.words = ["tiny_cpu.yaml", *(f"{key}={value}" for key, value in overrides.items())]
        self.words += words
        self.hosts = hosts

    def start(self, step: str) -> subprocess.Popen[bytes]:
        """Starts a step on the head."""
        words = [sys.executable, "-m", "pocl_dist", step, *self.words]
        paths = {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
        return self.hosts.start(self.hosts.head, words, self.log, paths, self.log.parent)

    def ends(self, step: str, seconds: float = 300) -> int:
        """Runs a step to its end; returns its exit code."""
        return self.start(step).wait(seconds)

    def said(self) -> str:
        """Returns the log."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def losses(self) -> dict[int, float]:
        """Returns the loss of each step; the last time it was taken counts."""
        rows = read_json_lines(self.run / "metrics.jsonl")
        return {int(row["step"]): float(row["loss"]) for row in rows if row["kind"] == "step"}  # type: ignore[arg-type]


def check(is_true: object, line: str) -> None:
    """Prints what was shown; ends the test when it is not so."""
    print(f"{'ok    ' if is_true else 'FAILED'} {line}", flush=True)
    if not is_true:
        raise SystemExit(1)


def refusals(hosts: Hosts, folder: Path) -> None:
    """Every start that cannot work is refused before anything is started."""

    def refused(code: int, words: str, *overrides: str) -> None:
        job = Job(hosts, folder, "refused", *overrides)
        job.log.unlink(missing_ok=True)
        started = time.monotonic()
        found = job.ends("distill", 60)
        told = job.said().strip().splitlines()
        line = told[-1] if told else ""
        seconds = time.monotonic() - started
        check(found == code and words in line, f"{found} in {seconds:.1f} s: {line[:160]}")

    none, wrong, far = folder / "none", folder / "wrong", folder / "far"
    wrong.write_text("h1 slots=1\nh2 slots=1\n")
    far.write_text("h1 slots=1\nh9 slots=1\n")
    refused(66, "does not exist", f"launch.hostfile={none}")
    two_each = ("launch.ranks_per_node=2", "engine.world_size=4")
    refused(64, "slots=1", f"launch.hostfile={wrong}", *two_each)
    refused(69, "h9", f"launch.hostfile={far}")
    keyless = folder / "keyless"
    keyless.write_text(hosts.ssh_config.read_text().replace("user_key", "no_such_key"))
    refused(69, "password", f"launch.ssh_config={keyless}")
    code = "import socket, time; s = socket.create_server(('', 8476)); time.sleep(60)"
    listener = hosts.start("h1", [sys.executable, "-c", code], folder / "listener.log")
    time.sleep(1)
    refused(69, "8476")
    listener.kill()
    listener.wait()


def uninterrupted(hosts: Hosts, folder: Path) -> Job:
    """Returns a job that was left alone."""
    job = Job(hosts, folder, "whole")
    started = time.monotonic()
    check(
        job.ends("distill") == 0,
        f"two hosts, uninterrupted: {len(job.losses())} steps in "
        f"{time.monotonic() - started:.0f} s",
    )
    return job


def cut_off(hosts: Hosts, folder: Path) -> Job:
    """Returns a job that lost a host in the middle and ended as promised."""
    job = Job(hosts, folder, "cut")
    process = job.start("distill")
    while not any(step >= CUT_AFTER_STEP for step in job.losses()):
        if process.poll() is not None:
            print(job.said())
            check(False, f"ended early with {process.returncode}")
        time.sleep(0.1)
    hosts.cut("h2")
    started = time.monotonic()
    code = process.wait(ENDS_WITHIN_SECONDS + 60)
    seconds = time.monotonic() - started
    status = read_json(job.run / "status.json")
    print(job.said()[-3000:])
    check(
        code == 71 and status["exit_code"] == 71,
        f"h2 cut off after step {max(job.losses())}: "
        f"exit code {code}, status.json says {status['exit_code']}",
    )
    check(
        seconds <= ENDS_WITHIN_SECONDS,
        f"ended {seconds:.1f} s after the cut, promised {ENDS_WITHIN_SECONDS:.0f} s",
    )
    check("h2" in str(status["reason"]), f"named: {status['reason']}")
    left = hosts.wait_until_quiet(["ctl", "h1", "h2"], 60)
    check(not left, f"no process is left on any host {left or ''}")
    return job


def resumes(hosts: Hosts, job: Job, whole: Job) -> None:
    """The same command goes on to the end of the run that was left alone."""
    hosts.mend("h2")
    check(job.ends("distill") == 0, "the same command resumed")
    check(job.losses() == whole.losses(), f"the losses of {len(whole.losses())} steps are equal")
    weights = [sha256_file(each.run / "export" / "model.safetensors") for each in (job, whole)]
    check(weights[0] == weights[1], f"the exported weights are equal, sha256 {weights[0][:12]}")


def main() -> int:
    """Returns 0 when all was shown, 77 when it cannot be tried here, else 1."""
    missing = why_not() or ("" if shutil.which("pdsh") else "not installed: pdsh")
    if missing:
        print(f"SKIPPED: {missing}")
        return 77
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the hosts are taken away
    folder = Path(tempfile.mkdtemp(prefix="pocl-hosts-"))
    started = time.monotonic()
    with Hosts(folder) as hosts:
        (folder / "hostfile").write_text("h1 slots=1\nh2 slots=1\n")
        refusals(hosts, folder)
        whole = Job(hosts, folder, "whole")
        check(whole.ends("plan") == 0, "planned")
        whole = uninterrupted(hosts, folder)
        check(Job(hosts, folder, "cut").ends("plan") == 0, "planned again")
        job = cut_off(hosts, folder)
        resumes(hosts, job, whole)
    print(f"all shown in {time.monotonic() - started:.0f} s")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
