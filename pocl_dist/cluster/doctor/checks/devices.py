"""GPUs of this machine: how many, how much memory, how fast they exchange gradients."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import cast

from pocl_dist.cluster.doctor.case import Case
from pocl_dist.cluster.doctor.checks.disk import size
from pocl_dist.cluster.doctor.checks.ranks import is_elsewhere
from pocl_dist.cluster.doctor.finding import Finding, SkipError, error, ok, warning
from pocl_dist.cluster.doctor.probing import all_reduce_here, all_reduce_of_job, describe_gpus
from pocl_dist.cluster.doctor.visible_gpus import num_visible_gpus

MEGABYTES = 256
SLOW_BYTES_PER_SECOND = 1e9
"""Less than PCIe 3 gives: the traffic goes over a slow network or through the host's memory."""
MOSTLY_FREE = 0.9
ON_A_NODE = "on a compute node: srun --nodes N --ntasks-per-node=1 pocl-dist doctor CONFIG"


def gpus(case: Case) -> Iterator[Finding]:
    """Counts the GPUs and asks torch, in a process of its own, what they are."""
    count = num_visible_gpus()
    if count == 0:
        if case.options.with_gpu:
            yield error(69, "--gpu was given, and no GPU is visible here")
            return
        raise SkipError("no GPU is visible here", ON_A_NODE)
    told = describe_gpus()
    devices = cast("list[dict[str, object]]", told["devices"])
    if len(devices) < count:
        yield error(
            69,
            f"the driver shows {count} GPU(s), torch {told['torch']} (CUDA {told['cuda']}) "
            f"{len(devices)}",
        )
        return
    wanted = case.config.launch.gpus_per_node
    if is_elsewhere(case) and len(devices) < wanted:
        yield error(64, f"launch.gpus_per_node is {wanted}, and {len(devices)} GPU(s) are here")
    yield from _devices(case, devices)
    names = ", ".join(sorted({str(device["name"]) for device in devices}))
    total = min(float(cast("int", device["total"])) for device in devices)
    yield ok(
        f"{len(devices)} x {names}, {size(total)} each; CUDA {told['cuda']}, NCCL {told['nccl']}"
    )


def _devices(case: Case, devices: list[dict[str, object]]) -> Iterator[Finding]:
    for index, device in enumerate(devices):
        free, total = cast("int", device["free"]), cast("int", device["total"])
        if free < MOSTLY_FREE * total:
            yield warning(
                f"GPU {index} ({device['name']}): {size(free)} of {size(total)} are free",
                "Another process holds its memory; the run may not fit.",
                "nvidia-smi shows which; ask the scheduler for exclusive GPUs",
            )
        if not device["has_bf16"] and case.config.engine.dtype in (None, "bf16"):
            yield warning(
                f"GPU {index} ({device['name']}) has no bf16 of its own",
                "It is emulated and slow; engine.dtype null means bf16 on a GPU.",
                "engine.dtype: fp16 (or fp32)",
            )
    if len({str(device["name"]) for device in devices}) > 1:
        yield warning(
            "the GPUs of this machine differ",
            "All ranks wait for the slowest, and the smallest memory is the bound.",
            "choose equal ones with CUDA_VISIBLE_DEVICES",
        )


def bandwidth(case: Case) -> Iterator[Finding]:
    """Times an all-reduce over all GPUs here, or over all ranks when a launcher started this."""
    count = num_visible_gpus()
    if count == 0:
        raise SkipError("no GPU is visible here", ON_A_NODE)
    is_rank = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    if is_rank:
        told = all_reduce_of_job("cuda", MEGABYTES)
    elif count > 1:
        told = all_reduce_here(count, "cuda", MEGABYTES)
    else:
        raise SkipError(
            "one GPU has nothing to exchange",
            "over all nodes: torchrun --nnodes N --nproc-per-node G -m pocl_dist doctor CONFIG",
        )
    yield judged(told)


def judged(told: dict[str, object]) -> Finding:
    """Returns the finding about a measured all-reduce."""
    speed = float(cast("float", told["bytes_per_second"]))
    line = (
        f"all-reduce of {MEGABYTES} MiB over {told['world_size']} ranks: "
        f"{size(speed)}/s bus bandwidth"
    )
    if not told["is_right"]:
        return error(
            71, f"{line}, and the sum is wrong", "A link or a GPU damages data.", "NCCL_DEBUG=INFO"
        )
    if speed < SLOW_BYTES_PER_SECOND:
        return warning(
            line,
            "Every step waits for gradients and weights to go round at this speed.",
            "NCCL_DEBUG=INFO tells the path taken; NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose one",
        )
    return ok(line)
