"""The command that starts the ranks of a step: a file of launch/ and the variables it reads."""

from __future__ import annotations

import os
import sys

from pocl_dist.config import Config
from pocl_dist.config.shipped import PACKAGE


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
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    if launch.master_address is not None:
        environment["MASTER_ADDR"] = launch.master_address
    return environment
