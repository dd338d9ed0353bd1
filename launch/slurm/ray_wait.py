"""Waits until a Ray cluster has all its nodes: ray_wait.py HEAD:PORT NUM_NODES SECONDS."""

import logging
import sys
import time

import ray


def main() -> None:
    """Exits with 69 when the nodes have not met in time."""
    address, num_nodes, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    ends = time.monotonic() + seconds
    while sum(bool(node["Alive"]) for node in ray.nodes()) < num_nodes:
        if time.monotonic() > ends:
            sys.exit(69)
        time.sleep(1.0)


if __name__ == "__main__":
    main()
