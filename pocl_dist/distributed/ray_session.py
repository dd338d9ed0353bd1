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
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from pocl_dist.config import RayConfig
from pocl_dist.distributed import ray_reaper
from pocl_dist.distributed.ray_reachable import check_reachable, one_line
from pocl_dist.distributed.ray_watch import DaemonWatch
from pocl_dist.errors import RefusedError, UnavailableError
from pocl_dist.guards import shown

# Answers and token ids are all that passes through it; Ray's default is 30 % of the memory.
OBJECT_STORE_BYTES = 200 << 20
# Ray's sockets lie under the folder; a path of more than 107 bytes is no socket address.
LONGEST_TEMPORARY_PATH = 40


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
        raise UnavailableError(f"{what}: {one_line(error)}") from error


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
