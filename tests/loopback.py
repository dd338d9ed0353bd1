"""Runs a command in a network namespace that has nothing but loopback, where that is possible.

    python tests/loopback.py COMMAND ...

Ray's ports listen on every interface whatever it is told; here nobody else's machine can reach
them, and a test that would call out fails. Root needs no more; other users get a user namespace.
Neither `unshare` nor `ip` need to be installed. Where namespaces are forbidden (many containers)
the command runs in the host's network, after a loud warning; $POCL_TEST_NETWORK tells which it is.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

VARIABLE = "POCL_TEST_NETWORK"
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1


def _unshare(flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(probe, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(probe, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def enter() -> None:
    """Moves this process into a namespace with loopback only; OSError where that is forbidden."""
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        _unshare(CLONE_NEWNET)
    else:
        _unshare(CLONE_NEWUSER | CLONE_NEWNET)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _loopback_up()


def main() -> None:
    """Enters the namespace, if possible, and becomes the command."""
    try:
        enter()
        os.environ[VARIABLE] = "loopback"
    except OSError as error:
        os.environ[VARIABLE] = "host"
        line = "!" * 88
        print(
            f"{line}\n! No network namespace ({error}): the tests run in the HOST'S NETWORK, and "
            f"Ray's ports\n! listen on all of its interfaces (token authentication is on).\n{line}",
            file=sys.stderr,
            flush=True,
        )
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
