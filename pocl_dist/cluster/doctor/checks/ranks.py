"""Ranks: do they share the batch, and do the variables of a launcher agree with one another."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from pocl_dist.cluster.doctor.case import Case
from pocl_dist.cluster.doctor.finding import Finding, error, ok, warning
from pocl_dist.cluster.doctor.visible_gpus import num_visible_gpus
from pocl_dist.config.launch_checks import check_fits, check_local
from pocl_dist.distributed.rank_rules import check_ranks, num_ranks

# The variables that a launcher sets for every rank. No others are read or shown.
_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def is_elsewhere(case: Case) -> bool:
    """Returns whether the run is for the machines of the launch section, not for this one."""
    return case.options.has_shape or case.config.launch.ranks_with != "local"


def batch(case: Case) -> Iterator[Finding]:
    """Whether the global batch can be shared by the ranks, and each rank gets a device."""
    config, launch = case.config, case.config.launch
    if is_elsewhere(case):
        check_fits(config)
        ranks = launch.num_ranks
        where = f"{launch.nodes} x {launch.num_ranks_per_node}"
        device = "a GPU each" if launch.gpus_per_node else "on the CPU"
    else:
        gpus = num_visible_gpus()
        check_local(config)
        check_ranks(config, gpus)
        ranks = num_ranks(config, gpus)
        where, device = "this machine", f"{gpus} GPUs visible" if gpus else "on the CPU"
    share = config.engine.global_batch_size // ranks
    micro = config.engine.micro_batch_size
    yield ok(
        f"{ranks} {'rank' if ranks == 1 else 'ranks'} ({where}, {device}): {share} rows each per "
        f"step, in micro-batches of at most {micro}"
    )


def launcher_variables(case: Case) -> Iterator[Finding]:
    """Whether RANK, WORLD_SIZE, MASTER_* and Slurm's variables are there together and agree."""
    given = {name: os.environ[name] for name in _OF_A_RANK if name in os.environ}
    problems = list(_rank_problems(case, given))
    yield from problems
    slurm = list(_slurm(case))
    yield from slurm
    if not given and not slurm:
        yield ok("no launcher has started this process")
    elif not problems and given:
        told = ", ".join(f"{name}={given[name]}" for name in ("RANK", "WORLD_SIZE"))
        yield ok(f"a launcher has started this as a rank: {told}")


def _rank_problems(case: Case, given: dict[str, str]) -> Iterator[Finding]:
    if not given.keys() & {"RANK", "WORLD_SIZE"}:
        return
    missing = [name for name in _OF_A_RANK if name not in given]
    if "RANK" in missing or "WORLD_SIZE" in missing:
        name = "RANK" if "RANK" in given else "WORLD_SIZE"
        yield warning(
            f"{name} is set, {', '.join(missing)} not",
            "A step is a rank only with both; alone the variable is a leftover of another job.",
            f"unset {name}",
        )
        return
    numbers = [given[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in given]
    if not all(re.fullmatch(r"\d{1,7}", number) for number in numbers):
        yield error(64, f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers: {given}")
        return
    rank, world_size = int(given["RANK"]), int(given["WORLD_SIZE"])
    if rank >= world_size:
        yield error(64, f"RANK is {rank}, but WORLD_SIZE is {world_size}: ranks count from 0")
    if world_size > 1 and missing:
        yield error(
            64 if "LOCAL_RANK" in missing else 69,
            f"{', '.join(missing)} not set for rank {rank} of {world_size}",
        )
    wanted = case.config.engine.world_size
    if wanted not in (None, world_size):
        yield error(64, f"engine.world_size is {wanted}, but the launcher started {world_size}")


def _slurm(case: Case) -> Iterator[Finding]:
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    nodes = os.environ.get("SLURM_JOB_NUM_NODES", os.environ.get("SLURM_NNODES", ""))
    launch = case.config.launch
    if is_elsewhere(case) and nodes.isdigit() and int(nodes) != launch.nodes:
        yield error(
            64,
            f"launch.nodes is {launch.nodes}, but Slurm job {job} has {nodes} node(s)",
            how="ask for as many nodes as launch.nodes says, or change it",
        )
        return
    per_node = os.environ.get("SLURM_NTASKS_PER_NODE", "1")
    if per_node != "1" and launch.ranks_with == "srun":
        yield warning(
            f"Slurm job {job} starts {per_node} tasks per node",
            "launch/srun.sh starts one task per node, which starts the ranks there.",
            "#SBATCH --ntasks-per-node=1",
        )
        return
    yield ok(f"inside Slurm job {job} on {nodes or '?'} node(s)")
