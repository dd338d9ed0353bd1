"""Two "pods" distil as an Indexed Job would start them; one is evicted, one is lost, both go on.

python -m tests.cluster.kubernetes_pods        (as root; about three minutes on two cores)

There is no Kubernetes here. What the rendered files say is done by hand: the ConfigMap is laid out
as files, and each pod is a process id namespace of its own whose first process is tini, with the
container's arguments and nothing in its environment but what the container's `env` and the Job
controller give. MASTER_ADDR alone is another: pods have names, these have 127.0.0.1.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from pocl_dist.cluster.launch_plan import make_plan
from pocl_dist.cluster.targets import k8s
from pocl_dist.cluster.targets.k8s_pods import SCRIPTS
from pocl_dist.files import read_json, read_json_lines, sha256_file
from tests import loopback

PACKAGES = ("tini",)
REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 24
ENDS_WITHIN_SECONDS = 240


def check(is_true: bool, what: str) -> None:
    """Prints what was seen; ends the test where it was not so."""
    print(f"{'ok' if is_true else 'FAILED'}: {what}", flush=True)
    if not is_true:
        sys.exit(1)


class Run:
    """The rendered files of one run, laid out as its pods find them."""

    def __init__(self, folder: Path, name: str) -> None:
        words = [
            "tiny_cpu.yaml", f"run_dir={name}", "data.limit=96", "data.dev=null", "data.eval=[]",
            "curriculum.num_stages=2", "curriculum.visits_per_example=4",
            "curriculum.ordering=shuffled", "checkpoint.every=4", "checkpoint.keep_last=50",
            "engine.timeout_seconds=30", "launch.nodes=2", "launch.gpus_per_node=0",
            f"launch.name={name}", f"launch.k8s.mount_path={folder}", "launch.k8s.claim=pocl",
            "launch.k8s.image=localhost/pocl-dist:test", "launch.join_seconds=60",
            "launch.environment={GLOO_SOCKET_IFNAME: lo, OMP_NUM_THREADS: '1'}",
        ]  # fmt: skip
        files = k8s.render(make_plan(words))
        self.root, self.log = folder / name, folder / f"{name}.log"
        self.scripts = folder / f"{name}-scripts"
        self.scripts.mkdir()
        (config_map, _) = yaml.safe_load_all(files["run.yaml"])
        for file, text in config_map["data"].items():
            (self.scripts / file).write_text(text)
        self.jobs = {
            step: list(yaml.safe_load_all(files[f"{number}-{step}.yaml"]))[-1]
            for number, step in enumerate(("plan", "distill", "report"), start=1)
        }

    def start(self, step: str, index: int | None = None) -> subprocess.Popen[bytes]:
        """Starts a pod of a step; its whole process tree ends with the process that is returned."""
        container = self.jobs[step]["spec"]["template"]["spec"]["containers"][0]
        environment = {item["name"]: item["value"] for item in container["env"]}
        environment |= {
            # of the image
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(self.scripts.parent),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(REPOSITORY),
            # of the cluster
            "KUBERNETES_SERVICE_HOST": "10.96.0.1",
            "HOSTNAME": f"{self.jobs[step]['metadata']['name']}-{index or 0}",
        }
        if index is not None:
            environment |= {"JOB_COMPLETION_INDEX": str(index), "MASTER_ADDR": "127.0.0.1"}
        arguments = [word.replace(SCRIPTS, str(self.scripts)) for word in container["args"]]
        namespaces = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        entry = ["tini", "--", "bash", str(REPOSITORY / "docker" / "entrypoint.sh")]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*namespaces, *entry, *arguments],
                cwd=container["workingDir"],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def ends(self, pods: list[subprocess.Popen[bytes]]) -> list[int]:
        """Waits for pods and returns their exit codes; none outlives this."""
        try:
            return [pod.wait(ENDS_WITHIN_SECONDS) for pod in pods]
        except subprocess.TimeoutExpired:
            print(self.log.read_text()[-3000:])
            return [-1]
        finally:
            for pod in pods:
                pod.kill()
                pod.wait()

    def distill(self) -> list[subprocess.Popen[bytes]]:
        """Starts the two pods, the second first: they come up in any order."""
        return [self.start("distill", 1), self.start("distill", 0)][::-1]

    def wait_for_step(self, step: int) -> None:
        """Returns when the run has logged a step."""
        ends = time.monotonic() + ENDS_WITHIN_SECONDS
        while time.monotonic() < ends and step not in self.losses():
            time.sleep(0.2)

    def losses(self) -> dict[int, float]:
        """Returns the loss of each step; of one taken twice the last."""
        rows = read_json_lines(self.root / "metrics.jsonl")
        return {row["step"]: row["loss"] for row in rows if row["kind"] == "step"}  # type: ignore[misc]

    def action(self, code: int) -> str:
        """Returns what the Job's podFailurePolicy does about an exit code."""
        rules: list[dict[str, Any]] = self.jobs["distill"]["spec"]["podFailurePolicy"]["rules"]
        found = [r["action"] for r in rules if code in r.get("onExitCodes", {}).get("values", [])]
        return found[0] if found else "Count"


def first_process(pod: subprocess.Popen[bytes]) -> int:
    """Returns the process id of a pod's tini, which gets the signals of the kubelet."""
    (child,) = Path(f"/proc/{pod.pid}/task/{pod.pid}/children").read_text().split()
    return int(child)


def whole(folder: Path) -> Run:
    """A run that nothing disturbs; before its plan is there, the pods say what is missing."""
    run = Run(folder, "whole")
    codes = run.ends(run.distill())
    check(codes == [66, 66], f"without a plan both pods end with 66: {codes}")
    check(run.action(66) == "FailJob", "which the Job does not try again")
    codes = run.ends([run.start("plan")])
    check(codes == [0], f"the pod of plan ended with {codes}")
    codes = run.ends(run.distill())
    check(codes == [0, 0], f"both pods of distill ended with {codes}")
    check(len(run.losses()) == STEPS, f"{len(run.losses())} steps of {STEPS}")
    status = read_json(run.root / "status.json")
    check(status["kubernetes_pod"] == "whole-distill-0", f"by pod {status['kubernetes_pod']}")
    check((run.root / "export" / "model.safetensors").exists(), "the student is exported")
    codes = run.ends([run.start("report")])
    check(codes == [0] and (run.root / "report.json").exists(), "the pod of report wrote its file")
    return run


def same_end(run: Run, other: Run) -> None:
    """The pods that the Job would start again come to the result of the undisturbed run."""
    codes = run.ends(run.distill())
    check(codes == [0, 0], f"started again, both pods ended with {codes}")
    check(run.losses() == other.losses(), f"the losses of {len(other.losses())} steps are equal")
    found = {sha256_file(each.root / "export" / "model.safetensors") for each in (run, other)}
    check(len(found) == 1, f"the exported weights are equal, sha256 {min(found)[:12]}")


def evicted(folder: Path) -> Run:
    """Pod 1 gets SIGTERM, as at a drain: all save and end with 75."""
    run = Run(folder, "evicted")
    run.ends([run.start("plan")])
    pods = run.distill()
    run.wait_for_step(6)
    os.kill(first_process(pods[1]), signal.SIGTERM)
    codes = run.ends(pods)
    check(codes == [75, 75], f"SIGTERM to pod 1: both pods ended with {codes}")
    check(run.action(75) == "Count", "which the Job starts again")
    check(not (run.root / "control" / "stop").exists(), "no stop file is left for the next attempt")
    return run


def lost(folder: Path) -> Run:
    """Pod 1 is killed without a word: pod 0 ends with 71."""
    run = Run(folder, "lost")
    run.ends([run.start("plan")])
    pods = run.distill()
    run.wait_for_step(6)
    pods[1].kill()
    codes = run.ends(pods)
    check(codes == [71, -9], f"pod 1 killed: the pods ended with {codes}")
    check(run.action(71) == run.action(137) == "Count", "which the Job starts again")
    check(
        not re.search(r"ended without a word|Traceback", read_json_reason(run)), "named by rank 0"
    )
    return run


def read_json_reason(run: Run) -> str:
    """Returns why the run ended."""
    return str(read_json(run.root / "status.json")["reason"])


def main() -> int:
    """Returns 0 when all was shown, 77 when it cannot be tried here, else 1."""
    missing = [tool for tool in ("tini", "unshare", "getent") if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        print(f"SKIPPED: not root, or not installed: {', '.join(missing)} (Debian: tini)")
        return 77
    try:
        loopback.enter()
    except OSError as error:
        print(f"SKIPPED: no network namespaces: {error}")
        return 77
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder, started = Path(tempfile.mkdtemp(prefix="pocl-pods-")), time.monotonic()
    undisturbed = whole(folder)
    same_end(evicted(folder), undisturbed)
    same_end(lost(folder), undisturbed)
    print(f"all shown in {time.monotonic() - started:.0f} s")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
