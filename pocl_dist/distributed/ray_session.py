"""Starts and stops Ray, private and local or an existing cluster; always with token authentication.

Ray's ports listen on every interface whatever one asks for, so the token is the guard
(Ray's own token file is world-readable, ours is 0600 in a 0700 folder). Dashboard and
usage statistics are off.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from pocl_dist.config import RayConfig
from pocl_dist.distributed import ray_reaper
from pocl_dist.distributed.ray_watch import DaemonWatch
from pocl_dist.errors import ConfigError, RefusedError, UnavailableError
from pocl_dist.guards import shown

# Answers and token ids are all that passes through it; Ray's default is 30 % of the memory.
OBJECT_STORE_BYTES = 200 << 20
# Ray's sockets lie under the folder; a path of more than 107 bytes is no socket address.
LONGEST_TEMPORARY_PATH = 40
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


@cache
def _private_folder() -> Path:
    """Returns a 0700 folder of this process, removed at its exit.

    Not earlier: threads of Ray still read the token while it shuts down, and abort without it.
    """
    usual = tempfile.gettempdir()
    short = usual if len(usual) <= LONGEST_TEMPORARY_PATH else "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="pocl-", dir=short))
    owner = os.getpid()
    atexit.register(
        lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None
    )
    return folder


@cache
def _token_file() -> Path:
    path = _private_folder() / "token"
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(handle, "w") as stream:
        stream.write(secrets.token_hex(32))
    return path


@cache
def _start_reaper() -> subprocess.Popen[bytes] | None:
    """Starts the process that cleans up after this one: its input ends when this process is gone.

    The pipe is a bare number: Python would close a file while this process still shuts down.
    """
    if not Path("/proc/self/fd").exists():
        return None
    its_end, _ = os.pipe()
    with os.fdopen(its_end, "rb") as stream:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", ray_reaper.__file__, str(_private_folder())],
            stdin=stream,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C and the end of the driver's group are not its end
        )


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _one_line(error: BaseException | str) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _initialise(what: str, **options: object) -> None:
    import ray
    from ray.exceptions import RayError

    known = (RayError, RuntimeError, ConnectionError, TimeoutError, ValueError)
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)  # type: ignore[arg-type]
    except Exception as error:
        # A daemon that dies while it starts: Ray raises a bare Exception. Any other is a bug.
        if type(error) is not Exception and not isinstance(error, known):
            raise
        raise UnavailableError(f"{what}: {_one_line(error)}") from error


def _start_local(config: RayConfig) -> None:
    _start_reaper()
    # With more actors asked for than there are CPUs, Ray would wait for CPUs for ever.
    num_cpus = None if config.num_actors is None else config.num_actors * config.cpus_per_actor
    _initialise(
        "a local Ray could not be started",
        address="local",  # not None: that would join whatever RAY_ADDRESS names
        num_cpus=num_cpus,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _temp_dir=str(_private_folder() / "ray"),
    )


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
        reason = _one_line(said[-1]) if said else "Ray gave no reason"
        raise UnavailableError(f"{complaint}: {reason}") from error


def _join_cluster(address: str, timeout_seconds: float) -> None:
    check_reachable(address, timeout_seconds)
    _initialise(f"ray.address: could not join {address}", address=address)


def _shut_down() -> None:
    import ray

    if ray.is_initialized():  # else its start has failed
        ray.shutdown()


def _head_address() -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


def check_token_mode() -> None:
    """Raises RefusedError (77) when the environment asks for a Ray without token."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        raise RefusedError(
            f"RAY_AUTH_MODE is {shown(os.environ['RAY_AUTH_MODE'])} in the environment: Ray "
            "listens on all interfaces, and without a token whoever reaches a port can run code "
            "(ShadowRay, CVE-2023-48022); unset it (SECURITY.md)"
        )


@contextlib.contextmanager
def ray_session(config: RayConfig, on_lost: Callable[[str], None] | None = None) -> Iterator[None]:
    """Holds a connection to Ray; on exit its processes, devices, files are gone (a cluster's stay).

    Inside another session it changes nothing. `on_lost(reason)` is called, from any thread, when
    Ray's daemons die; it must not return, since Ray will end this process with code 1. Raises
    UnavailableError (69) when Ray cannot be reached, RefusedError (77) when it would run, or runs,
    without a token.
    """
    check_token_mode()
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        # An actor without GPU keeps the caller's environment.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    if config.address is None:
        environment["RAY_AUTH_TOKEN_PATH"] = str(_token_file())
    with _environment(environment):
        import ray

        if ray.is_initialized():
            yield
            return
        # Ray reads its environment once, at import; who imported it before us
        # did so without the token.
        ray._raylet.Config.initialize("")  # type: ignore[attr-defined]
        with contextlib.ExitStack() as stack:
            if config.address is None:
                stack.callback(shutil.rmtree, _private_folder() / "ray", ignore_errors=True)
            else:
                _join_cluster(config.address, config.start_timeout_seconds)
            stack.callback(_shut_down)
            if on_lost is not None:
                head = None if config.address is None else _head_address()
                watch = stack.enter_context(DaemonWatch(head, on_lost))
            if config.address is None:
                _start_local(config)
                if on_lost is not None:
                    watch.is_up = True
            yield
