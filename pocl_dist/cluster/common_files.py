"""The files that every job has: its config, its environment, and how one step is run."""

from __future__ import annotations

from pocl_dist.cluster.launch_plan import LaunchPlan
from pocl_dist.cluster.templates import fill
from pocl_dist.config.shipped import launch_file


def common_files(
    plan: LaunchPlan, ranks_with: str, ray_address: str | None = None
) -> dict[str, str]:
    """Returns config, environment and what runs a step; a job copies nothing from elsewhere."""
    return {
        "config.yaml": plan.config_yaml(ranks_with, ray_address),
        "env.sh": env_sh(plan),
        **{
            name: launch_file(f"common/{name}").read_text(encoding="utf-8")
            for name in ("run_phase.sh", "wait_for.sh")
        },
    }


def env_sh(plan: LaunchPlan) -> str:
    """Returns what a script of a job sources first, on every node."""
    launch = plan.config.launch
    return fill(
        "common/env.sh",
        {
            "python": launch.python,
            "run_dir": plan.run_dir,
            "grace_seconds": launch.grace_seconds,
            "folder": launch.folder or ".",
            "device": "cpu" if plan.gpus_per_node == 0 else "gpu",
            "environment": launch.environment,
            "setup": launch.setup,
        },
    )
