"""Whether a Ray cluster can be joined, and whether it lets in anybody; asked before joining."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from pocl_dist.errors import ConfigError, RefusedError, UnavailableError

# The first call refuses a wrong token at once; `ray.init` alone retries it for 20 seconds.
# Before it, the probe knocks without a token: whoever is let in so is let run anything there.
_PROBE = """
import logging, os, sys
os.environ["RAY_AUTH_MODE"] = "disabled"
import ray
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import AuthenticationError
address = canonicalize_bootstrap_address(sys.argv[1])
try:
    ray._raylet.GcsClient(address=address)
except AuthenticationError:
    pass
else:
    sys.exit(77)
os.environ["RAY_AUTH_MODE"] = "token"
ray._raylet.Config.initialize("")
ray._raylet.GcsClient(address=address)
ray.init(sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
"""


def one_line(error: BaseException | str) -> str:
    """Returns the first line of what Ray says, which is often a page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _has_token() -> bool:
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(given) or (Path.home() / ".ray" / "auth_token").exists()


def check_reachable(address: str, timeout_seconds: float) -> None:
    """Raises UnavailableError (69) unless a Ray driver can join `address` in time.

    RefusedError (77) when it would let in whoever has no token, ConfigError (64) for no address.
    Tried in a process of its own, since `ray.init` retries for minutes in C++
    and cannot be interrupted.
    """
    token = "set" if _has_token() else "unset"
    complaint = (
        f"ray.address: cannot reach Ray at {address} within {timeout_seconds:g} s (token: {token})"
    )
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(
                f"ray.address: {address!r} is not allowed: 'auto', or the head's HOST:PORT"
            )
        try:
            socket.create_connection((host, int(port)), timeout=timeout_seconds).close()
        except OSError as error:
            raise UnavailableError(f"{complaint}: {error}") from error
    try:
        subprocess.run(
            [sys.executable, "-c", _PROBE, address],
            timeout=timeout_seconds,
            check=True,
            capture_output=True,
            text=True,
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(complaint) from error
    except subprocess.CalledProcessError as error:
        if error.returncode == 77:
            raise RefusedError(
                f"ray.address: the cluster at {address} lets in whoever reaches its ports, without "
                "a token (ShadowRay, CVE-2023-48022); start it with RAY_AUTH_MODE=token "
                "(SECURITY.md)"
            ) from error
        said = [line for line in error.stderr.splitlines() if "Error" in line]
        reason = one_line(said[-1]) if said else "Ray gave no reason"
        raise UnavailableError(f"{complaint}: {reason}") from error
