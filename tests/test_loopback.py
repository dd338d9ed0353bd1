"""In which network the tests run: `make test` starts them in one that has loopback only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import loopback

SCRIPT = Path(loopback.__file__)


def interfaces() -> list[str]:
    lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    return sorted(line.partition(":")[0].strip() for line in lines)


def test_the_tests_run_in_a_network_that_has_loopback_only() -> None:
    mode = os.environ.get(loopback.VARIABLE, "unset")
    if mode != "loopback":
        pytest.skip(f"NOT ISOLATED: Ray's ports listen on {interfaces()} (network: {mode})")
    assert interfaces() == ["lo"]


def test_the_script_brings_loopback_up_or_says_loudly_that_it_cannot() -> None:
    code = (
        "import os, socket; s = socket.create_server(('127.0.0.1', 0)); "
        "socket.create_connection(s.getsockname()); "
        "from tests.test_loopback import interfaces; "
        f"print(os.environ['{loopback.VARIABLE}'], *interfaces())"
    )
    done = subprocess.run(
        [sys.executable, str(SCRIPT), sys.executable, "-c", code],
        capture_output=True, text=True, check=True, cwd=SCRIPT.parents[1],
    )  # fmt: skip
    mode, *found = done.stdout.split()
    if mode == "loopback":
        assert found == ["lo"]
    else:
        assert mode == "host" and "HOST'S NETWORK" in done.stderr


def test_without_permission_the_command_runs_all_the_same_after_a_warning() -> None:
    code = (
        "import sys; from tests import loopback\n"
        "def refuse(flags): raise PermissionError(1, 'Operation not permitted')\n"
        "loopback._unshare = refuse; sys.argv = ['loopback', *sys.argv[1:]]; loopback.main()"
    )
    words = [sys.executable, "-c", code, "sh", "-c", f"echo ran in ${loopback.VARIABLE}; exit 3"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=SCRIPT.parents[1])
    assert (done.returncode, done.stdout) == (3, "ran in host\n")
    assert "HOST'S NETWORK" in done.stderr and "Operation not permitted" in done.stderr
