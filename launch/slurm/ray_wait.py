"""Waits until a Ray cluster has all its nodes: ray_wait.py HEAD:PORT NUM_NODES SECONDS."""

import logging
import sys
import time

import ray


def main() -> None:
    """Exits with 1 and a word when the nodes have not met in time."""
    address, num_nodes, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    ends = time.monotonic() + seconds
    while not ray.is_initialized():
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except (
            ConnectionError
        ) as error:  # a head that listened, but did not come up, is tried again
            if time.monotonic() > ends:
                sys.exit(f"no Ray at {address}: {error}")
            time.sleep(5.0)
    while sum(bool(node["Alive"]) for node in ray.nodes()) < num_nodes:
        if time.monotonic() > ends:
            sys.exit(f"the {num_nodes} nodes of Ray have not met at {address}")
        time.sleep(1.0)


if __name__ == "__main__":
    main()
