"""(b) A Ray cluster over two hosts runs measure; one host loses its power; the result is the same.

    python -m tests.cluster.ray_hosts        (as root; about two minutes on two cores)

The hosts are network namespaces, Ray's daemons are started as in a Slurm job (launch/slurm/
ray_node.sh), with a token. The network of the second host is cut before its processes are killed,
so that no reset tells the others of it: they must find out by its silence.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.cluster.hosts import PACKAGES as PACKAGES
from tests.cluster.hosts import Hosts, why_not

REPOSITORY = Path(__file__).resolve().parents[2]
BASE_PORT = 5000
NUM_ROWS = 1600
WORDS = (
    "configs/tiny_cpu.yaml",
    f"data.limit={NUM_ROWS}",
    "generation.batch_size=8",
    "ray.num_actors=2",
    "ray.shard_size=64",
    "ray.start_timeout_seconds=400",
)
STARTED = time.monotonic()


def say(line: str) -> None:
    """Prints a line with the time since the start."""
    print(f"[{time.monotonic() - STARTED:6.1f} s] {line}", flush=True)


class RayHosts:
    """Ray's daemons on h1 (head) and h2."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.hosts = hosts
        self.folder = folder
        self.address = f"{hosts.address['h1']}:{BASE_PORT + 1}"
        self._nodes: list[subprocess.Popen[bytes]] = []
        token = folder / "ray" / "token"
        token.parent.mkdir(mode=0o700)
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        self.environment = {
            "PYTHONPATH": str(REPOSITORY),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "RAY_worker_register_timeout_seconds": "120",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def start(self) -> None:
        """Starts both nodes and returns when they have met."""
        self._start("h1", "head", "h2")
        address = self.folder / "ray" / "address"
        ends = time.monotonic() + 300
        while not address.exists():
            assert time.monotonic() < ends, f"no head: see {self.folder}/ray-h1.log"
            time.sleep(0.2)
        assert address.read_text().strip() == self.address
        self._start("h2", "worker", self.address)
        wait = ["launch/slurm/ray_wait.py", self.address, "2", "300"]
        assert self.run("h1", *wait).wait() == 0, f"the nodes have not met: see {self.folder}"

    def _start(self, host: str, *words: str) -> None:
        # What job.sh gives to a node; another job id, because the hosts share one /tmp.
        variables = {
            "SLURM_JOB_ID": f"{os.getpid()}-{host}",
            "SLURMD_NODENAME": host,
            "BASE_PORT": str(BASE_PORT),
            "NODE_CPUS": "1",
            "NODE_GPUS": "0",
            "RAY_DIR": str(self.folder / "ray"),
            "CONTAINER": str(REPOSITORY / "launch/slurm/container_none.sh"),
            "IMAGE_PYTHON": sys.executable,
        }
        command = ["bash", str(REPOSITORY / "launch/slurm/ray_node.sh"), *words]
        log = self.folder / f"ray-{host}.log"
        self._nodes.append(self.hosts.start(host, command, log, self.environment | variables))

    def run(self, host: str, *words: str) -> subprocess.Popen[bytes]:
        """Starts python with `words` on a host, as a driver of this cluster."""
        log = self.folder / "driver.log"
        command = [sys.executable, *words]
        return self.hosts.start(host, command, log, self.environment, REPOSITORY)

    def measure(self, run_dir: Path) -> subprocess.Popen[bytes]:
        """Starts the pass on the cluster."""
        words = [*WORDS, f"ray.address={self.address}", f"run_dir={run_dir}"]
        return self.run("h1", "-m", "pocl_dist", "measure", *words)

    def stop(self) -> None:
        """Lets the nodes end by themselves; `Hosts` ends what does not."""
        (self.folder / "ray" / "end").touch()
        for node in self._nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(30)
        for host in self.hosts.names:
            shutil.rmtree(f"/tmp/pocl-ray-{os.getpid()}-{host}", ignore_errors=True)


def shards(run_dir: Path) -> dict[str, bytes]:
    """Returns the difficulty files of a run that are whole."""
    return {path.name: path.read_bytes() for path in (run_dir / "difficulty").glob("shard-*")}


def check(cluster: RayHosts, folder: Path) -> None:
    """Runs the pass undisturbed and disturbed; the files are equal, byte by byte."""
    undisturbed, disturbed = folder / "undisturbed", folder / "disturbed"
    started = time.monotonic()
    code = cluster.measure(undisturbed).wait()
    assert code == 0, f"the undisturbed pass ended with {code}"
    wanted = shards(undisturbed)
    say(f"undisturbed pass: {len(wanted)} files, {time.monotonic() - started:.0f} s")

    (folder / "driver.log").rename(folder / "undisturbed.log")
    started = time.monotonic()
    driver = cluster.measure(disturbed)
    while len(shards(disturbed)) < 4:
        assert driver.poll() is None, "the pass has ended before a node could be lost"
        time.sleep(0.02)
    cluster.hosts.cut("h2")
    cluster.hosts.kill("h2")
    num_done = len(shards(disturbed))
    say(f"h2 is dead, {num_done} of {len(wanted)} files are saved")
    assert num_done < len(wanted), "too late: everything was done"
    code = driver.wait()
    log = (folder / "driver.log").read_text()
    assert code == 0, f"the disturbed pass ended with {code}\n{log}"
    assert "its actor died" in log, f"nothing was lost with h2\n{log}"
    found = shards(disturbed)
    assert found.keys() == wanted.keys()
    assert all(found[name] == data for name, data in wanted.items()), "the files differ"
    say(f"disturbed pass: {time.monotonic() - started:.0f} s, {len(found)} files, all identical")
    for line in log.splitlines():
        if "its actor died" in line:
            print(f"           {line.strip()[:150]}")


def main() -> int:
    """Returns 0 when the promise is kept, 77 when it cannot be tried here."""
    if reason := why_not():
        print(f"SKIPPED: {reason}")
        return 77
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(tempfile.mkdtemp(prefix="pocl-ray-"))
    is_good = False
    try:
        with Hosts(folder) as hosts:
            cluster = RayHosts(hosts, folder)
            try:
                cluster.start()
                say(f"Ray on h1 and h2, head {cluster.address}")
                check(cluster, folder)
                is_good = True
            finally:
                cluster.stop()
    finally:
        if is_good:
            shutil.rmtree(folder)
        else:
            print(f"FAILED: logs are in {folder}", flush=True)
    say("ray: as promised")
    return 0


if __name__ == "__main__":
    sys.exit(main())
