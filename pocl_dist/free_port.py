"""A port for the ranks of one machine to meet at; `python -m pocl_dist.free_port` prints one.

Loads no library: launch/local.sh asks before every start.
"""

from __future__ import annotations

import random
import socket

from pocl_dist.errors import UnavailableError

# The kernel's own (32768 and above by default) would not do: until rank 0 has imported torch and
# listens, seconds pass in which it may give the same port to any connection of another process.
# Ray's workers take 10002 to 19999.
PORTS = range(20000, 32768)


def free_port() -> int:
    """Returns a port that nobody listens on now, and that nobody gets who does not ask for it.

    Raises UnavailableError (69) when all that were tried are taken.
    """
    for port in random.SystemRandom().sample(PORTS, min(100, len(PORTS))):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise UnavailableError(f"of 100 ports of {PORTS.start} to {PORTS.stop - 1} none is free")


if __name__ == "__main__":
    print(free_port())
