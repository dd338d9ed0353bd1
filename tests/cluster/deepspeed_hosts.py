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
OVER_SSH = "launch.ranks_with=deepspeed"


class Job:
    """One run over the hosts."""

    def __init__(self, hosts: Hosts, folder: Path, run: str, *words: str) -> None:
        self.hosts = hosts
        self.run = folder / run
        self.log = folder / f"{run}.log"
        overrides = {
            "run_dir": self.run,
            "data.limit": 96,
            "data.dev": "null",
            "data.eval": "[]",
            "curriculum.num_stages": 2,
            "curriculum.visits_per_example": 4,
            "curriculum.ordering": "shuffled",
            "checkpoint.every": 5,
            "engine.timeout_seconds": TIMEOUT_SECONDS,
            "launch.nodes": 2,
            "launch.gpus_per_node": 0,
            "launch.hostfile": folder / "hostfile",
            "launch.ssh_port": SSH_PORT,
            "launch.ssh_config": hosts.ssh_config,
            "launch.dead_link_seconds": DEAD_LINK_SECONDS,
            "launch.master_address": "h1",
            "launch.python": sys.executable,
            "launch.environment": "{GLOO_SOCKET_IFNAME: eth0}",
        }
        self.words = ["tiny_cpu.yaml", *(f"{key}={value}" for key, value in overrides.items())]
        self.words += words

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Starts a pocl-dist command with the job's config on the head."""
        return self.start_on(
            self.hosts.head, sys.executable, "-m", "pocl_dist", *words, *self.words
        )

    def start_on(self, host: str, *words: str, code: str = "") -> subprocess.Popen[bytes]:
        """Starts a command on a host; `code`: a folder with another copy of the package."""
        package = self.log.parent / code if code else REPOSITORY
        paths = {"PYTHONPATH": str(package), "HF_HUB_OFFLINE": "1"}
        return self.hosts.start(host, words, self.log, paths, self.log.parent)

    def ends(self, *words: str, seconds: float = 300) -> int:
        """Runs a pocl-dist command to its end; returns its exit code."""
        return self.start(*words).wait(seconds)

    def said(self) -> str:
        """Returns the log."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def losses(self) -> dict[int, float]:
        """Returns the loss of each step; the last time it was taken counts."""
        rows = read_json_lines(self.run / "metrics.jsonl")
        return {int(str(row["step"])): float(str(row["loss"])) for row in rows if "loss" in row}

    def weights(self) -> str:
        """Returns the digest of the exported weights."""
        return sha256_file(self.run / "export" / "model.safetensors")


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
        found = job.ends("distill", OVER_SSH, seconds=60)
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


def submitted(hosts: Hosts, folder: Path) -> Job:
    """Returns a run that `pocl-dist launch --target deepspeed` started, and nobody disturbed."""
    job = Job(hosts, folder, "whole")
    started = time.monotonic()
    check(job.ends("launch", "--target", "deepspeed") == 0, "pocl-dist launch has submitted")
    pid = int(job.said().splitlines()[0])
    while _is_alive(pid):
        time.sleep(0.2)
    status = read_json(job.run / "status.json")
    if status["exit_code"] != 0:
        print((job.run / "launch" / "head.log").read_text()[-5000:])
    check(
        status["exit_code"] == 0 and status["phase"] == "run",
        f"deepspeed over two hosts, as process {pid}: {len(job.losses())} steps in "
        f"{time.monotonic() - started:.0f} s",
    )
    return job


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def by_hand(hosts: Hosts, folder: Path, whole: Job) -> None:
    """What `launch --target torchrun` renders, started on each host."""
    job = Job(hosts, folder, "by_hand")
    files = folder / "by_hand_files"
    check(job.ends("launch", "--target", "torchrun", "--render", str(files)) == 0, "rendered")
    started = time.monotonic()
    other = job.start_on("h2", "bash", str(files / "other_node.sh"), "1")
    first = job.start_on("h1", "bash", str(files / "first_node.sh"))
    codes = [first.wait(300), other.wait(120)]
    if any(codes):
        print(job.said()[-5000:])
    check(codes == [0, 0], f"torchrun on two hosts by hand: {time.monotonic() - started:.0f} s")
    same_as(job, whole)


def strays(hosts: Hosts, folder: Path) -> None:
    """A host with other code and another config is refused by name, before a model is loaded."""
    job = Job(hosts, folder, "strays")
    files, stray = folder / "stray_files", folder / "stray_files_h2"
    check(job.ends("launch", "--target", "torchrun", "--render", str(files)) == 0, "rendered")
    shutil.copytree(files, stray)
    text = (stray / "config.yaml").read_text()
    (stray / "config.yaml").write_text(text.replace("micro_batch_size: 8", "micro_batch_size: 4"))
    shutil.copytree(REPOSITORY / "pocl_dist", folder / "other_code" / "pocl_dist")
    with (folder / "other_code" / "pocl_dist" / "errors.py").open("a") as file:
        file.write("# an edit on one host only\n")
    other = job.start_on("h2", "bash", str(stray / "other_node.sh"), "1", code="other_code")
    first = job.start_on("h1", "bash", str(files / "first_node.sh"))
    code = first.wait(120)
    other.terminate()
    other.wait(60)
    reason = str(read_json(job.run / "status.json")["reason"])
    is_named = "host h2: code sha256" in reason and "engine.micro_batch_size is 4, not 8" in reason
    check(code == 78 and is_named, f"{code}: {reason.splitlines()[-1]}")
    check(not (job.run / "checkpoints").exists(), "nothing was trained")


def same_as(job: Job, whole: Job) -> None:
    """Losses and weights of two runs are equal, to the last bit."""
    check(job.losses() == whole.losses(), f"the losses of {len(whole.losses())} steps are equal")
    pair = [job.weights(), whole.weights()]
    check(pair[0] == pair[1], f"the exported weights are equal, sha256 {pair[0][:12]}")


def cut_off(hosts: Hosts, folder: Path) -> Job:
    """Returns a job that lost a host in the middle and ended as promised."""
    job = Job(hosts, folder, "cut")
    check(job.ends("plan") == 0, "planned")
    process = job.start("distill", OVER_SSH)
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
    check("not reachable any more: h2" in str(status["reason"]), f"named: {status['reason']}")
    left = hosts.wait_until_quiet(["ctl", "h1", "h2"], 60)
    check(not left, f"no process is left on any host {left or ''}")
    return job


def resumes(hosts: Hosts, job: Job, whole: Job) -> None:
    """The same command goes on to the end of the run that was left alone."""
    hosts.mend("h2")
    started = time.monotonic()
    if job.ends("distill", OVER_SSH) != 0:
        print(job.said()[-5000:])
    check(
        read_json(job.run / "status.json")["exit_code"] == 0,
        f"the same command resumed, {time.monotonic() - started:.0f} s",
    )
    same_as(job, whole)


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
        whole = submitted(hosts, folder)
        strays(hosts, folder)
        by_hand(hosts, folder, whole)
        resumes(hosts, cut_off(hosts, folder), whole)
    print(f"all shown in {time.monotonic() - started:.0f} s")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
