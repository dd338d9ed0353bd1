"""The port that ranks of one machine meet at."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pocl_dist import free_port as module
from pocl_dist.errors import UnavailableError
from pocl_dist.free_port import PORTS, free_port


def test_the_kernel_gives_the_port_to_nobody_else() -> None:
    ephemeral = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if not ephemeral.exists():
        pytest.skip("only Linux says which ports it hands out")
    first, last = map(int, ephemeral.read_text().split())
    if (first, last) != (32768, 60999):
        pytest.skip(f"this machine hands out {first} to {last}, not Linux's default")
    assert all(not first <= free_port() <= last for _ in range(20))
    assert PORTS.stop <= first


def test_a_port_that_is_taken_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", free_port()))
        taken = server.getsockname()[1]
        monkeypatch.setattr(module, "PORTS", range(taken, taken + 1))
        with pytest.raises(UnavailableError, match=f"of {taken} to {taken} none is free"):
            free_port()
        monkeypatch.setattr(module, "PORTS", range(taken, taken + 20))
        assert free_port() != taken


def test_the_command_prints_it_alone() -> None:
    line = [sys.executable, "-m", "pocl_dist.free_port"]
    done = subprocess.run(line, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert int(done.stdout) in PORTS and not done.stderr
