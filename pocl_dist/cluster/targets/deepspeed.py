"""deepspeed: the run is started on this machine; its ranks run on the hosts of a hostfile."""

from __future__ import annotations

import shlex
import socket
import sys
from pathlib import Path

from pocl_dist.cluster.apart import start_apart
from pocl_dist.cluster.common_files import common_files
from pocl_dist.cluster.launch_plan import LaunchPlan
from pocl_dist.cluster.templates import fill
from pocl_dist.errors import ConfigError
from pocl_dist.hosts import check_hosts, chosen_hosts

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
    """Starts `head.sh` on this machine, apart from the terminal; returns where to look.

    Raises what `pocl_dist.hosts` finds wrong with the hosts before anything is started.
    """
    where = Path.cwd() / (plan.config.launch.folder or "")
    hosts = chosen_hosts(plan.config.launch, where)
    # A bare name means what `launch.setup` makes of it; the ranks are asked again by the run.
    named = plan.config.launch.python
    check_hosts(hosts, plan.config.launch, named if "/" in named else sys.executable, where)
    pid = start_apart(folder / "head.sh", folder / LOG)
    return (
        f"{pid}\nlaunch: runs as process {pid} on {socket.gethostname()}; "
        f"its output is in {folder / LOG}; how it ended: "
        f"pocl-dist outcome {shlex.quote(plan.run_dir)}"
    )
