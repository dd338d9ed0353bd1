"""The hosts of a hostfile: read, and asked over ssh before anything is started on them.

The deepspeed launcher trains on this machine alone when the hostfile is missing, waits for a
password that nobody types, and hangs on a host that went away; here each is an error that says so.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import socket
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pocl_dist.config import LaunchConfig
from pocl_dist.errors import ConfigError, MissingInputError, UnavailableError
from pocl_dist.guards import printable, shown

CONNECT_SECONDS = 10
# What a host that was asked answers with; ssh's own failures are 255.
_NO_FOLDER, _NO_PYTHON, _PORT_IN_USE = 81, 82, 83
# A name may not look like an option of ssh.
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_LINE = re.compile(r"(\S+)\s+slots=([0-9]{1,6})")
# As the store of the ranks binds it, so that a connection of the last attempt that is only
# waiting to be forgotten is no obstacle.
_BIND = (
    "import socket, sys; s = socket.socket(); "
    "s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); "
    "s.bind(('', int(sys.argv[1]))); s.listen()"
)


@dataclass(frozen=True)
class Host:
    """One line of a hostfile."""

    name: str
    slots: int


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """Returns the hosts; MissingInputError (66) without the file, ConfigError (64) for bad ones."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise MissingInputError(f"launch.hostfile: {path} does not exist") from None
    except UnicodeDecodeError:
        raise ConfigError(f"launch.hostfile: {path} is not text") from None
    hosts: list[Host] = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = _LINE.fullmatch(text)
        if found is None or not _HOST.fullmatch(found[1]) or int(found[2]) == 0:
            raise ConfigError(
                f"launch.hostfile: {path}, line {number}: {shown(text)} is not `HOST slots=N`"
            )
        if any(found[1] == host.name for host in hosts):
            raise ConfigError(f"launch.hostfile: {path}, line {number}: {found[1]} is there twice")
        hosts.append(Host(found[1], int(found[2])))
    if not hosts:
        raise ConfigError(f"launch.hostfile: {path} names no host; write `HOST slots=N` in a line")
    return tuple(hosts)


def chosen_hosts(launch: LaunchConfig, folder: Path | None = None) -> tuple[Host, ...]:
    """Returns the first `launch.nodes` hosts; ConfigError (64) when there are less, or of slots.

    `folder`: what relative paths count from; None: where this process is.
    """
    if launch.hostfile is None:
        raise ConfigError("launch.hostfile: is required with launch.ranks_with 'deepspeed'")
    hosts = read_hostfile((folder or Path.cwd()) / launch.hostfile)
    if len(hosts) < launch.nodes:
        raise ConfigError(
            f"launch.nodes: {launch.nodes}, but {launch.hostfile} names {len(hosts)} host(s): "
            f"{', '.join(host.name for host in hosts[:8])}"
        )
    needed = launch.num_ranks_per_node
    for host in hosts[: launch.nodes]:
        if host.slots < needed:
            raise ConfigError(
                f"launch.hostfile: {host.name} has slots={host.slots} in {launch.hostfile}, but "
                f"{needed} ranks are wanted on each host (launch.ranks_per_node, else "
                "launch.gpus_per_node)"
            )
    return hosts[: launch.nodes]


def ssh_options(launch: LaunchConfig) -> list[str]:
    """Returns options with which ssh never asks for anything, and ends when the link is cut."""
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": str(CONNECT_SECONDS),
        "ServerAliveInterval": str(max(1, launch.dead_link_seconds // 3)),
        "ServerAliveCountMax": "3",
    }
    words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    words += ["-p", str(launch.ssh_port)]
    return words if launch.ssh_config is None else [*words, "-F", launch.ssh_config]


def check_hosts(
    hosts: Sequence[Host], launch: LaunchConfig, python: str, where: Path | None = None
) -> None:
    """Raises an error for the first host that ranks could not be started on.

    UnavailableError (69): not reachable, asks for a password, or the port of rank 0 is taken on
    the first one. MissingInputError (66): the folder `where` (None: that of this process) or the
    interpreter is not there.
    """
    folder = str(where or Path.cwd())
    ask = (
        f"cd {shlex.quote(folder)} || exit {_NO_FOLDER}; "
        f"command -v {shlex.quote(python)} >/dev/null || exit {_NO_PYTHON}"
    )
    first = f"{ask}; {shlex.quote(python)} -c {shlex.quote(_BIND)} {launch.master_port}"
    questions = [f"{first} || exit {_PORT_IN_USE}", *[ask] * (len(hosts) - 1)]
    with ThreadPoolExecutor(min(64, len(hosts))) as pool:
        answers = list(pool.map(lambda host, text: _ask(host, text, launch), hosts, questions))
    for host, (code, words) in zip(hosts, answers, strict=True):
        _raise_for(host.name, code, words, folder, python, launch)


def unreachable(hosts: Sequence[Host], launch: LaunchConfig) -> list[str]:
    """Returns the hosts that do not answer over ssh now."""
    with ThreadPoolExecutor(min(64, len(hosts))) as pool:
        answers = list(pool.map(lambda host: _ask(host, "true", launch), hosts))
    return [host.name for host, (code, _) in zip(hosts, answers, strict=True) if code]


def _ask(host: Host, command: str, launch: LaunchConfig) -> tuple[int, str]:
    """Returns the exit code of a command on a host and the last line that it or ssh complained."""
    line = ["ssh", "-n", "-a", "-x", *ssh_options(launch), host.name, command]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=3 * CONNECT_SECONDS)
    except subprocess.TimeoutExpired:
        return 255, f"no answer in {3 * CONNECT_SECONDS} s"
    except FileNotFoundError:
        raise UnavailableError("ssh: is not installed on this machine") from None
    said = done.stderr.strip().splitlines() or [""]
    return done.returncode, printable(said[-1])


def _raise_for(
    host: str, code: int, words: str, folder: str, python: str, launch: LaunchConfig
) -> None:
    everywhere = "every host must see the same files"
    if code == _NO_FOLDER:
        raise MissingInputError(f"host {host}: there is no folder {folder}; {everywhere}")
    if code == _NO_PYTHON:
        raise MissingInputError(f"host {host}: there is no interpreter {python}; {everywhere}")
    if code == _PORT_IN_USE:
        raise UnavailableError(_port_message(host, launch.master_port, words))
    if code and ("ermission denied" in words or "verification failed" in words):
        raise UnavailableError(
            f"host {host}: ssh would ask for a password or a key ({words}); "
            f"make `ssh -o BatchMode=yes -p {launch.ssh_port} {host} true` work first"
        )
    if code:
        raise UnavailableError(
            f"host {host}: is not reachable over ssh on port {launch.ssh_port}: {words or code}"
        )


def _port_message(host: str, port: int, words: str) -> str:
    return (
        f"launch.master_port: {port} is in use on {host} ({words}); end what listens there, "
        "or choose another"
    )


def check_port_here(port: int) -> None:
    """Raises UnavailableError (69) when the port of rank 0 is taken on this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            words = os.strerror(error.errno)
            raise UnavailableError(_port_message("this machine", port, words)) from None
