"""A child process of doctor that loads torch: what the GPUs are, how fast they exchange data.

    python -m pocl_dist.cluster.doctor.gpu_probe describe
    python -m pocl_dist.cluster.doctor.gpu_probe all-reduce DEVICE MEGABYTES    (one per rank)

The last line of output is JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta

import torch
from torch import distributed

WAIT_SECONDS = 60
NUM_WARM_UP, NUM_TIMED = 3, 10


def describe() -> dict[str, object]:
    """Returns the visible GPUs and what torch was built with."""
    devices: list[dict[str, object]] = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        with torch.cuda.device(index):
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        devices.append({"name": about.name, "free": free, "total": total, "has_bf16": has_bf16})
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if devices else None
    return {
        "devices": devices,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": nccl,
    }


def all_reduce(device_type: str, megabytes: int) -> dict[str, object]:
    """Returns what a sum over all ranks costs; every rank of the launcher's variables calls this.

    Bus bandwidth as nccl-tests count it: bytes / seconds * 2 (n - 1) / n, comparable over any
    number of ranks.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    is_gpu = device_type == "cuda"
    device = torch.device(device_type)
    if is_gpu:
        device = torch.device(device_type, int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if is_gpu else "gloo", timeout=timedelta(seconds=WAIT_SECONDS)
    )
    values = torch.ones((megabytes << 20) // 4, device=device)
    for _ in range(NUM_WARM_UP):
        distributed.all_reduce(values)
    if is_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(NUM_TIMED):
        distributed.all_reduce(values)
    if is_gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / NUM_TIMED
    # After 13 sums of ones over n ranks each element is n ** 13, exact or not: the same everywhere.
    is_right = bool((values == values[0]).all()) and float(values[0]) >= world_size
    distributed.destroy_process_group()
    bandwidth = values.numel() * 4 / seconds * 2 * (world_size - 1) / world_size
    return {
        "rank": rank,
        "world_size": world_size,
        "seconds": seconds,
        "bytes_per_second": bandwidth,
        "is_right": is_right,
    }


if __name__ == "__main__":
    if sys.argv[1] == "describe":
        print(json.dumps(describe()))
    else:
        print(json.dumps(all_reduce(sys.argv[2], int(sys.argv[3]))))
