"""A Ray that lets in whoever reaches its ports is neither started nor joined (ShadowRay)."""

from __future__ import annotations

import base64
import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pocl_dist.config import RayConfig
from pocl_dist.distributed.ray_reachable import check_reachable
from pocl_dist.distributed.ray_session import ray_session
from pocl_dist.errors import RefusedError
from tests.ranks import free_port

OPEN = {**os.environ, "RAY_AUTH_MODE": "disabled"}
HEAD = """
import sys, ray
ray.init(address="local", include_dashboard=False, num_cpus=1, _temp_dir=sys.argv[1],
         object_store_memory=100 << 20, logging_level="ERROR")
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


def assert_refused(address: str) -> None:
    """Asks for the cluster as `ray.address` does."""
    with pytest.raises(RefusedError, match=r"lets in whoever reaches.*CVE-2023-48022") as caught:
        check_reachable(address, 60.0)
    assert caught.value.exit_code == 77


def gcs_server(folder: str, port: int) -> list[str]:
    """Returns the command line of Ray's control server, as `ray start --head` has it."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.origin is not None
    return [
        str(Path(spec.origin).parent / "core" / "src" / "ray" / "gcs" / "gcs_server"),
        f"--log_dir={folder}",
        f"--session-dir={folder}",
        "--session-name=open",
        f"--config_list={base64.b64encode(b'{}').decode()}",
        f"--gcs_server_port={port}",
        "--node-ip-address=127.0.0.1",
        f"--node-id={'ab' * 28}",
    ]


def test_a_control_server_without_a_token_is_refused(tmp_path: Path) -> None:
    port = free_port()
    server = subprocess.Popen(
        gcs_server(str(tmp_path), port),
        env=OPEN,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, "no server"
                time.sleep(0.05)
        assert_refused(f"127.0.0.1:{port}")
    finally:
        server.terminate()
        server.wait(timeout=20)


@pytest.mark.slow
def test_a_whole_cluster_without_a_token_is_refused() -> None:
    with tempfile.TemporaryDirectory(prefix="open-", dir="/tmp") as folder:  # sockets: short paths
        head = subprocess.Popen(
            [sys.executable, "-c", HEAD, folder],
            env=OPEN,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            assert head.stdout is not None
            assert_refused(head.stdout.readline().strip())
        finally:
            head.communicate("", timeout=30)


def test_an_environment_that_turns_the_token_off_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(RefusedError, match="RAY_AUTH_MODE is 'disabled'"), ray_session(RayConfig()):
        raise AssertionError("a session without a token")
