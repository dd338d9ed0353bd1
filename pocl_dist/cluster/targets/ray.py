"""ray: the steps as jobs of a Ray cluster that is there, one after the other."""

from __future__ import annotations

import subprocess
from pathlib import Path

from pocl_dist.cluster.common_files import common_files
from pocl_dist.cluster.launch_plan import LaunchPlan
from pocl_dist.cluster.templates import Value, fill
from pocl_dist.config.shipped import launch_file
from pocl_dist.errors import EXIT_CODES, ConfigError, error_of


def render(plan: LaunchPlan) -> dict[str, str]:
    """Returns `submit.sh`, which submits, polls and resubmits, and what the jobs run.

    The passes take all of the cluster; ranks run where their job does, on one node.
    """
    launch = plan.config.launch
    if plan.nodes > 1:
        raise ConfigError(
            f"launch.nodes: {plan.nodes}: a job of a Ray cluster runs the ranks of distill on one "
            "node, and the passes on the whole cluster; set 1, or use another target"
        )
    job = launch.ray_job
    values: dict[str, Value] = {
        "name": plan.name,
        "address": job.address or "",
        "poll_seconds": job.poll_seconds,
        "max_resubmits": job.max_resubmits,
        "retryable": " ".join(str(row.code) for row in EXIT_CODES if row.is_retryable),
        "num_ranks": plan.num_ranks,
        "num_gpus": plan.gpus_per_node,
        "steps": plan.steps,
        "ranks_steps": " ".join(step for step in plan.steps if plan.is_ranks_work(step)),
    }
    return {
        **common_files(plan, ranks_with="local", ray_address=plan.config.ray.address or "auto"),
        "entry.sh": launch_file("ray/entry.sh").read_text(encoding="utf-8"),
        "submit.sh": fill("ray/submit.sh", values),
    }


def submit(plan: LaunchPlan, folder: Path) -> str:
    """Submits the jobs in turn, their ids printed as they begin, and waits for the last one.

    Raises the error with which a step ended for good; UnavailableError (69) without a cluster.
    """
    code = subprocess.run(["bash", str(folder / "submit.sh")], check=False).returncode
    if code:
        raise error_of(code, f"--target ray: ended with code {code}, see above") or RuntimeError(
            f"{folder / 'submit.sh'} ended with code {code}"
        )
    return f"launch: all {len(plan.steps)} steps are done"
