"""Where `pocl-dist launch` sends a run. A target is one file here and one entry below.

The file has `render(plan) -> {file name: text}`, which looks at nothing but the plan, and
`submit(plan, folder) -> job id(s)`, which is called when these files lie in `folder`.
"""

from __future__ import annotations

TARGETS: dict[str, str] = {
    "deepspeed": "hosts of a hostfile, over ssh and pdsh; started from here",
    "k8s": "Kubernetes: Indexed Jobs for ranks, KubeRay's RayJobs for the passes",
    "ray": "jobs on a Ray cluster that is there (`ray job submit`), one for each step",
    "slurm": "jobs with dependencies, one for each step (sbatch)",
    "torchrun": "one command for every node, started by hand",
}
