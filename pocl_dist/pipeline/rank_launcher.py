"""What is checked before ranks are started, and the variables of the files that start them."""

from __future__ import annotations

import os
import sys

from pocl_dist.config import Config
from pocl_dist.config.launch_checks import check_fits, check_local
from pocl_dist.config.shipped import PACKAGE
from pocl_dist.errors import WorkerError
from pocl_dist.hosts import check_hosts, check_port_here, chosen_hosts, unreachable
from pocl_dist.trackers.registry import wanted_trackers


def check_can_start(config: Config) -> None:
    """Raises an error when the ranks could not be started; starts nothing.

    ConfigError (64): machines and config do not fit, bad hostfile, too few slots; a tracker that is
    not installed.
    MissingInputError (66): no hostfile; a host that sees other files. UnavailableError (69): a host
    is not reachable, asks for a password, or the port of rank 0 is in use.
    """
    launch = config.launch
    wanted_trackers(config.log)
    if launch.ranks_with == "local":
        check_local(config)
        return
    check_fits(config)
    if launch.ranks_with == "deepspeed":
        check_hosts(chosen_hosts(launch), launch, sys.executable)
    elif launch.ranks_with == "torchrun":
        check_port_here(launch.master_port)


def name_lost_hosts(config: Config, error: WorkerError) -> WorkerError:
    """Returns the error with the hosts that do not answer any more, where they can be asked."""
    launch = config.launch
    if launch.ranks_with != "deepspeed":
        return error
    lost = unreachable(chosen_hosts(launch), launch)
    return WorkerError(f"not reachable any more: {', '.join(lost)}; {error}") if lost else error


def launch_environment(config: Config, step: str) -> dict[str, str]:
    """Returns the variables of launch/`launch.ranks_with`.sh and of the ranks it starts."""
    launch = config.launch
    environment = {**os.environ, **launch.environment, "PYTHON": sys.executable, "STEP": step}
    paths = [str(PACKAGE.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    if launch.ranks_with == "local":
        if config.engine.world_size is not None:
            environment["NUM_RANKS"] = str(config.engine.world_size)
        return environment
    environment |= {
        "NUM_NODES": str(launch.nodes),
        "RANKS_PER_NODE": str(launch.num_ranks_per_node),
        "MASTER_PORT": str(launch.master_port),
        "JOIN_SECONDS": str(launch.join_seconds),
        "GRACE_SECONDS": str(launch.grace_seconds),
    }
    if launch.gpus_per_node == 0:
        cpu = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "POCL_DIST_VISIBLE_DEVICES": ""}
        environment |= cpu
    if launch.ranks_with == "deepspeed":
        assert launch.hostfile is not None, "checked before"
        environment |= {
            "HOSTFILE": launch.hostfile,
            "SSH_PORT": str(launch.ssh_port),
            "SSH_CONFIG": launch.ssh_config or "",
            "DEAD_LINK_SECONDS": str(launch.dead_link_seconds),
            "LAUNCH_VARIABLES": ",".join(launch.environment),
        }
    if launch.master_address is not None:
        environment["MASTER_ADDR"] = launch.master_address
    return environment
