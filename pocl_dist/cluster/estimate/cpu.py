"""The device kind `cpu`: this machine, measured in a process of its own, or as flags give it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from pocl_dist.cluster.estimate.devices import GB, GIB, Device, Link
from pocl_dist.errors import UnavailableError

_TIMEOUT_SECONDS = 180
_LOOPBACK = Link(2 * GB, 2e-4)
_GUESS = {
    "bytes_per_second": 10 * GB,
    "op_seconds": 1e-5,
    "logit_seconds": 1.5e-8,
    "copy_bytes_per_second": GB,
}


def cpu_device(ranks_here: int, flops: float | None, tokens: int, hidden: int, ffn: int) -> Device:
    """Returns what one of `ranks_here` ranks has of this machine.

    Without `flops` (of a rank) all are measured: as many processes at once, with products of
    `tokens` x `hidden` x `ffn`. Else the other figures are usual ones of a server's core.
    """
    measured: dict[str, float] = dict(_GUESS)
    link, source = _LOOPBACK, "products by --flops, all else as is usual on a server"
    if flops is None:
        source = "measured on this machine"
        measured = measure(ranks_here, tokens, hidden, ffn)
        flops = measured["flops"]
        if ranks_here > 1:
            link = Link(measured["link_bytes_per_second"], measured["link_latency_seconds"])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(
        name="cpu",
        memory_bytes=memory // ranks_here,
        reserved_bytes=GIB,  # Python, torch and DeepSpeed in each process
        flops={"fp32": flops, "bf16": flops / 13, "fp16": flops / 13},  # measured
        product_efficiency=1.0,  # `flops` is what was reached
        bytes_per_second=measured["bytes_per_second"],
        intra=link,
        inter=Link(GB / 8, 1e-4),
        host_bytes_per_second=measured["bytes_per_second"],
        op_seconds=measured["op_seconds"],
        logit_seconds=measured["logit_seconds"],
        devices_per_node=max(1, ranks_here),
        source=source,
        copy_bytes_per_second=measured["copy_bytes_per_second"],
        overlaps=False,  # gloo's threads want the cores that compute
    )


def measure(num_ranks: int, tokens: int, hidden: int, ffn: int) -> dict[str, float]:
    """Returns what `measure_cpu` prints; torch is loaded in its processes only.

    Raises UnavailableError (69) when it fails or hangs.
    """
    package = Path(__file__).resolve().parents[3]
    paths = [str(package), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    words = [str(number) for number in (num_ranks, tokens, hidden, ffn)]
    command = [sys.executable, "-m", "pocl_dist.cluster.estimate.measure_cpu", *words]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=_TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(
            f"--device cpu: measuring took more than {_TIMEOUT_SECONDS} s; give --flops"
        ) from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise UnavailableError(f"--device cpu: measuring failed ({last}); give --flops")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def with_flags(
    device: Device,
    *,
    flops: float | None,
    memory_gib: float | None,
    intra_gb_per_s: float | None,
    inter_gb_per_s: float | None,
) -> Device:
    """Returns the device with what the command line knows better."""
    if flops is not None and not device.is_cpu:
        device = replace(device, flops=dict.fromkeys(device.flops, flops), product_efficiency=1.0)
    if memory_gib is not None:
        device = replace(device, memory_bytes=int(memory_gib * GIB))
    if intra_gb_per_s is not None:
        device = replace(device, intra=replace(device.intra, bytes_per_second=intra_gb_per_s * GB))
    if inter_gb_per_s is not None:
        device = replace(device, inter=replace(device.inter, bytes_per_second=inter_gb_per_s * GB))
    return device
