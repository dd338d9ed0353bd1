"""deepspeed: the run is started on this machine; its ranks run on the hosts of a hostfile."""

from __future__ import annotations

import shlex
import socket
import subprocess
from pathlib import Path

from pocl_dist.cluster.common_files import common_files
from pocl_dist.cluster.launch_plan import LaunchPlan
from pocl_dist.cluster.templates import fill
from pocl_dist.errors import ConfigError

LOG = "head.log"


def render(plan: LaunchPlan) -> dict[str, str]:
    """Returns `head.sh`, which runs all steps, and what it needs."""
    if plan.config.launch.hostfile is None:
        raise ConfigError("launch.hostfile: is required with the target deepspeed")
    return {
        **common_files(plan, ranks_with="deepspeed"),
        "head.sh": fill("deepspeed/head.sh", {}),
    }


def submit(plan: LaunchPlan, folder: Path) -> str:
    """Starts `head.sh` on this machine, apart from the terminal; returns where to look."""
    with (folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            ["bash", str(folder / "head.sh")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return (
        f"{process.pid}\nlaunch: runs as process {process.pid} on {socket.gethostname()}; "
        f"its output is in {folder / LOG}; how it ended: "
        f"pocl-dist outcome {shlex.quote(plan.run_dir)}"
    )
