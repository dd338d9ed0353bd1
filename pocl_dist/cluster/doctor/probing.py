"""Starts `gpu_probe` in processes of its own: doctor itself loads no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from pocl_dist.errors import WorkerError
from pocl_dist.free_port import free_port
from pocl_dist.guards import printable

TIMEOUT_SECONDS = 150.0
_PACKAGE_PARENT = str(Path(__file__).resolve().parents[3])


def describe_gpus() -> dict[str, object]:
    """Returns what torch says of the visible GPUs; WorkerError (71) when it fails."""
    return _answer(_start(["describe"], {}), "torch on the GPUs of this machine")


def all_reduce_here(num_ranks: int, device_type: str, megabytes: int) -> dict[str, object]:
    """Returns the cost of an all-reduce over ranks on this machine, one per device."""
    port = free_port()
    words = ["all-reduce", device_type, str(megabytes)]
    started = [
        _start(
            words,
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(num_ranks)
    ]
    try:
        answers = [_answer(process, "all-reduce on this machine") for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return answers[0]


def all_reduce_of_job(device_type: str, megabytes: int) -> dict[str, object]:
    """Returns the cost of an all-reduce over all ranks that a launcher started; each calls this."""
    process = _start(["all-reduce", device_type, str(megabytes)], {})
    return _answer(process, "all-reduce over the ranks of the job")


def _start(words: list[str], variables: Mapping[str, str]) -> subprocess.Popen[str]:
    paths = [_PACKAGE_PARENT, os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        **variables,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "pocl_dist.cluster.doctor.gpu_probe", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _answer(process: subprocess.Popen[str], what: str) -> dict[str, object]:
    try:
        out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise WorkerError(f"{what}: no answer in {TIMEOUT_SECONDS:g} s") from None
    if process.returncode:
        said = [line for line in err.strip().splitlines() if "rror" in line] or ["no reason given"]
        raise WorkerError(f"{what}: {printable(said[-1])}")
    return cast("dict[str, object]", json.loads(out.splitlines()[-1]))
