"""slurm: one job for each step, each waiting for the one before; a job restarts by itself."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from pocl_dist.cluster.common_files import common_files
from pocl_dist.cluster.launch_plan import LaunchPlan
from pocl_dist.cluster.templates import fill
from pocl_dist.config.shipped import launch_file
from pocl_dist.config.steps import is_actors_work
from pocl_dist.errors import EXIT_CODES, ConfigError, UnavailableError

# One process that loads no model.
LIGHT_STEPS = ("plan", "report")
_SHIPPED = ("srun.sh", "slurm/ray_cluster.sh", "slurm/ray_node.sh", "slurm/ray_wait.py")
# Ports are counted from launch.master_port upwards, by job id (launch/srun.sh).
_NUM_PORTS = 500


def render(plan: LaunchPlan) -> dict[str, str]:
    """Returns STEP.sbatch of every step, `submit.sh`, which submits all, and what they need."""
    _check(plan)
    launch, slurm = plan.config.launch, plan.config.launch.slurm
    container: dict[str, str | list[str]] = {}
    if slurm.container != "none":
        container = {"image": slurm.image or "", "mounts": slurm.mounts}
    files = {
        **common_files(plan, ranks_with="srun"),
        **{Path(name).name: launch_file(name).read_text(encoding="utf-8") for name in _SHIPPED},
        "container.sh": fill(f"slurm/container_{slurm.container}.sh", container),
        "job.sh": fill("slurm/job.sh", _job_values(plan)),
        "submit.sh": fill(
            "slurm/submit.sh",
            {
                "working_folder": launch.folder or ".",
                "folder": str(plan.folder),
                "steps": plan.steps,
            },
        ),
    }
    if slurm.container != "none":
        files["python.sh"] = fill("slurm/python.sh", {"python": launch.python})
    for step in plan.steps:
        values = {
            "header": [f"#SBATCH {option}" for option in options(plan, step)],
            "step": step,
            "kind": _kind(plan, step),
            "env": plan.path("env.sh"),
            "job": plan.path("job.sh"),
        }
        files[f"{step}.sbatch"] = fill("slurm/step.sbatch", values)
    return files


def _job_values(plan: LaunchPlan) -> dict[str, str | int]:
    launch, slurm = plan.config.launch, plan.config.launch.slurm
    return {
        "folder": str(plan.folder),
        "max_requeues": slurm.max_requeues,
        "retryable": " ".join(str(row.code) for row in EXIT_CODES if row.is_retryable),
        "has_container": "no" if slurm.container == "none" else "yes",
        "ranks_per_node": plan.ranks_per_node,
        "gpus_per_node": plan.gpus_per_node,
        "master_address": launch.master_address or "",
        "master_port": launch.master_port,
        "join_seconds": launch.join_seconds,
    }


def _kind(plan: LaunchPlan, step: str) -> str:
    if plan.is_ranks_work(step):
        return "ranks"
    # With a cluster of its own choice the config is obeyed: no other one is started.
    is_ours = is_actors_work(step, plan.config) and plan.config.ray.address is None
    return "actors" if is_ours else "single"


def options(plan: LaunchPlan, step: str) -> list[str]:
    """Returns the options of sbatch for a step, one per `#SBATCH` line, quoted for it.

    `B:`: the warning goes to the batch script alone; ranks that got it without torchrun's knowing
    would be taken for dead.
    """
    launch, slurm = plan.config.launch, plan.config.launch.slurm
    is_light = step in LIGHT_STEPS
    has_whole_nodes = slurm.exclusive and not is_light
    gpus = 0 if is_light else plan.gpus_per_node
    typed = f"{slurm.gpu_type}:{gpus}" if slurm.gpu_type else str(gpus)
    partition = (slurm.cpu_partition or slurm.partition) if is_light else slurm.partition
    given = {
        "job-name": f"{plan.name}-{step}",
        "nodes": 1 if _kind(plan, step) == "single" else plan.nodes,
        "ntasks-per-node": 1,
        "time": slurm.time_limit,
        "output": str(plan.folder / "logs" / f"{step}.out").replace("%", "%%"),
        "open-mode": "append",
        "requeue": True,
        "signal": f"B:USR1@{launch.grace_seconds}",
        "kill-on-invalid-dep": "yes",
        "chdir": launch.folder,
        "partition": partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": None if is_light else slurm.constraint,
        "exclusive": has_whole_nodes,
        "gpus-per-node": typed if gpus else None,
        "cpus-per-task": None if is_light else slurm.cpus_per_node,
        "mem": None if is_light else slurm.memory,
    }
    lines = [f"--{name}" for name, value in given.items() if value is True]
    lines += [
        f"--{name}={value}"
        for name, value in given.items()
        if value is not None and not isinstance(value, bool)
    ]
    return [quoted(line) for line in [*lines, *slurm.extra_options]]


def quoted(option: str) -> str:
    """Returns an option as sbatch reads it back from a `#SBATCH` line."""
    if any(sign in option for sign in "\n\r\\"):
        raise ConfigError(
            f"{option!r} has a line break or a backslash, which no job file of Slurm can hold: "
            "choose another run_dir (or launch.slurm.extra_options)"
        )
    if all(sign.isalnum() or sign in "-_=/.,:@%+|&" for sign in option):
        return option
    name, _, value = option.partition("=")
    escaped = value.replace('"', '\\"')
    return f'{name}="{escaped}"'


def _check(plan: LaunchPlan) -> None:
    """Raises ConfigError (64) for what Slurm jobs cannot do."""
    launch, slurm = plan.config.launch, plan.config.launch.slurm
    if (slurm.image is None) != (slurm.container == "none"):
        raise ConfigError(
            f"launch.slurm.image: {slurm.image!r} with launch.slurm.container "
            f"{slurm.container!r}: give both, or neither"
        )
    if _seconds(slurm.time_limit) <= launch.grace_seconds:
        raise ConfigError(
            f"launch.slurm.time_limit: {slurm.time_limit} is no longer than launch.grace_seconds "
            f"({launch.grace_seconds} s): the warning would come at once"
        )
    if launch.folder is not None and not launch.folder.startswith("/"):
        raise ConfigError(
            f"launch.folder: {launch.folder!r} must be absolute: jobs start wherever they are "
            "submitted"
        )
    if launch.master_port + _NUM_PORTS > 65536:
        raise ConfigError(
            f"launch.master_port: {launch.master_port} is too high: jobs use the {_NUM_PORTS} "
            "ports from it on, by their id"
        )
    if slurm.container != "none" and any(sign in plan.run_dir for sign in ":,"):
        raise ConfigError(f"run_dir: {plan.run_dir!r}: a container cannot mount a path with : or ,")


def _seconds(time_limit: str) -> int:
    """Returns a limit of Slurm ([days-]hours:minutes:seconds, minutes:seconds or minutes)."""
    days, _, clock = time_limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if len(parts) == 1:
        parts = [*parts, 0]
    seconds = sum(part * 60**i for i, part in enumerate(reversed(parts)))
    return seconds + 86400 * int(days or 0)


def submit(plan: LaunchPlan, folder: Path) -> str:
    """Submits the chain; returns a line `STEP JOB_ID` for each step.

    Raises UnavailableError (69), with nothing in the queue, when Slurm is not there or refuses.
    """
    if shutil.which("sbatch") is None:
        raise UnavailableError(
            "--target slurm: there is no sbatch on this machine; submit from a login node, or use "
            "--render DIR and start DIR/submit.sh there"
        )
    done = subprocess.run(
        ["bash", str(folder / "submit.sh")], capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"submit.sh ended with {done.returncode}"
        raise UnavailableError(f"--target slurm: {said}")
    return done.stdout.rstrip()
