"""torchrun: every node is started by hand; the first one runs the steps, the others only ranks."""

from __future__ import annotations

from pathlib import Path

from pocl_dist.cluster.common_files import common_files
from pocl_dist.cluster.launch_plan import LaunchPlan
from pocl_dist.cluster.templates import Value, fill
from pocl_dist.config.shipped import launch_file
from pocl_dist.errors import ConfigError, UsageError


def render(plan: LaunchPlan) -> dict[str, str]:
    """Returns `first_node.sh` (all steps), `other_node.sh NODE_RANK` and what they need."""
    launch = plan.config.launch
    if plan.nodes > 1 and launch.master_address is None:
        raise ConfigError(
            "launch.master_address: is required with the target torchrun: the first node, as the "
            "others call it"
        )
    other: dict[str, Value] = {
        "nodes": plan.nodes,
        "ranks_per_node": plan.ranks_per_node,
        "master_address": launch.master_address or "127.0.0.1",
        "master_port": launch.master_port,
        "join_seconds": launch.join_seconds,
        "ranks_steps": [step for step in plan.steps if plan.is_ranks_work(step)],
    }
    return {
        **common_files(plan, ranks_with="torchrun"),
        "first_node.sh": fill("torchrun/first_node.sh", {}),
        "other_node.sh": fill("torchrun/other_node.sh", other),
        "torchrun.sh": launch_file("torchrun.sh").read_text(encoding="utf-8"),
    }


def submit(plan: LaunchPlan, folder: Path) -> str:
    """Raises UsageError (2): there is nobody to submit to."""
    others = f", `bash {folder}/other_node.sh K` on node K = 1 ... {plan.nodes - 1}"
    raise UsageError(
        f"--target torchrun: there is no scheduler to submit to. The files are in {folder}; start "
        f"`bash {folder}/first_node.sh` on {plan.config.launch.master_address or 'this machine'}"
        f"{others if plan.nodes > 1 else ''}"
    )
