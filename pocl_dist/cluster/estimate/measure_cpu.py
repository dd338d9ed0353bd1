"""Measures this machine's CPU for `--device cpu`: `python -m ... RANKS TOKENS HIDDEN FFN`.

All ranks work at once, as they do in training, each with its share of the cores; the slowest
counts. The last line printed is one JSON object. The only module of this package that loads torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

_SECONDS = 0.5  # of each measurement
_CACHE_BYTES = 2**26  # more than a core's share of the caches


def _median_seconds(work: Callable[[], object]) -> float:
    """Returns the median time of a call, over half a second of calls."""
    work()
    times: list[float] = []
    started = time.perf_counter()
    while not times or time.perf_counter() - started < _SECONDS:
        before = time.perf_counter()
        work()
        times.append(time.perf_counter() - before)
    return sorted(times)[len(times) // 2]


def measure_rank(tokens: int, hidden: int, ffn: int) -> dict[str, float]:
    """Returns this process's rates: products, element-wise work, starts, logits."""
    import torch

    inputs, weight = torch.randn(tokens, hidden), torch.randn(ffn, hidden)
    grads = torch.randn(tokens, ffn)
    # Forward and the two products of backward, shaped as the model's.
    seconds = sum(
        (
            _median_seconds(lambda: inputs @ weight.T),
            _median_seconds(lambda: grads @ weight),
            _median_seconds(lambda: grads.T @ inputs),
        )
    )
    flops = 3 * 2 * tokens * hidden * ffn / seconds
    # Activations are many and each is read once: not what stays in the cache.
    count = max(2, _CACHE_BYTES // (4 * tokens * ffn))
    many = [torch.randn(tokens, ffn) for _ in range(count)]
    each = _median_seconds(lambda: [x * grads for x in many]) / count
    # Into memory that is new each time, as gathered weights are: its pages must be found first.
    copy = _median_seconds(lambda: torch.cat([x.flatten() for x in many]))
    one = torch.ones(1, requires_grad=True)
    start = _median_seconds(lambda: [one * 2.0 for _ in range(100)]) / 100
    logits = torch.randn(64, 8192)
    softmax = _median_seconds(lambda: torch.log_softmax(logits, dim=-1).exp())
    return {
        "flops": flops,
        "bytes_per_second": 12 * tokens * ffn / each,
        "copy_bytes_per_second": 4 * count * tokens * ffn / copy,
        "op_seconds": start,
        # Two of them for student and teacher, and the gradient: measured 3 times in blocks.
        "logit_seconds": 3 * softmax / logits.numel(),
    }


def measure_link(rank: int, world_size: int, meeting: str) -> dict[str, float]:
    """Returns bandwidth and latency of gloo's all-gather between the ranks. Collective."""
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size
    )

    def gather(num: int) -> float:
        part, whole = torch.zeros(num), torch.zeros(num * world_size)
        for _ in range(3):
            dist.all_gather_into_tensor(whole, part)
        started = time.perf_counter()
        for _ in range(20):
            dist.all_gather_into_tensor(whole, part)
        return (time.perf_counter() - started) / 20

    small, large = gather(1), gather(2**19)
    dist.destroy_process_group()
    steps = world_size - 1
    latency = small / steps
    return {
        "link_latency_seconds": latency,
        "link_bytes_per_second": 4 * 2**19 / max(1e-9, large / steps - latency),
    }


def _run_rank(rank: int, world_size: int, words: list[str], meeting: str) -> None:
    import torch

    tokens, hidden, ffn = map(int, words)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
    torch.manual_seed(rank)
    found = measure_rank(tokens, hidden, ffn)
    if world_size > 1:
        found |= measure_link(rank, world_size, meeting)
    print(json.dumps(found))


def main(words: list[str]) -> None:
    """Starts the ranks and prints what the slowest of them found."""
    if words[0] == "--rank":
        _run_rank(int(words[1]), int(words[2]), words[4:], words[3])
        return
    num_ranks = int(words[0])
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        command = [sys.executable, "-m", "pocl_dist.cluster.estimate.measure_cpu", "--rank"]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), str(num_ranks), meeting, *words[1:]],
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(num_ranks)
        ]
        outputs = [process.communicate()[0] for process in ranks]
        if any(process.returncode for process in ranks):
            raise SystemExit("a rank of the measurement failed")
    found = [json.loads(output.strip().splitlines()[-1]) for output in outputs]
    slowest = {
        key: (min if key == "flops" or "_per_" in key else max)(row[key] for row in found)
        for key in found[0]
    }
    print(json.dumps(slowest))


if __name__ == "__main__":
    main(sys.argv[1:])
