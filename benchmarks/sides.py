"""What the benchmarks share: sides and ranks in processes of their own, the machine, peak memory.

A script calls itself with arguments that name one side (`run_side`) or what ranks do (`run_ranks`);
each child prints one JSON object as its last line. Imports no torch: it would count as memory.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

MEMORY_KILL = -9
"""Exit status of a child that the kernel killed, which here means: for its memory."""

MEMORY_ERRORS = ("MemoryError", "can't allocate memory", "out of memory", "OutOfMemoryError")


def run_side(script: str, arguments: list[str]) -> dict[str, object]:
    """Returns the last line of `python script arguments` as a dictionary.

    A side that runs out of memory gives {"error": "out of memory"}; any other failure gives
    {"error": the end of what it wrote to stderr}.
    """
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1])
    if done.returncode == MEMORY_KILL or any(text in done.stderr for text in MEMORY_ERRORS):
        return {"error": "out of memory"}
    return {"error": f"exit status {done.returncode}: {done.stderr.strip()[-2000:]}"}


def run_ranks(
    script: str, arguments: list[str], world_size: int, port: int
) -> list[dict[str, object]]:
    """Returns the last line of each of so many ranks of `python script arguments`, on the CPU.

    Raises SystemExit with the end of what they wrote to stderr when one of them fails.
    """
    address = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    with tempfile.TemporaryFile("w+") as errors:
        ranks = [
            subprocess.Popen(
                [sys.executable, script, *arguments],
                env={**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            for rank in range(world_size)
        ]
        outputs = [process.communicate()[0] for process in ranks]
        if any(process.returncode for process in ranks):
            errors.seek(0)
            raise SystemExit(f"{arguments}, {world_size} ranks: {errors.read()[-3000:]}")
    return [json.loads(output.strip().splitlines()[-1]) for output in outputs]


def machine() -> dict[str, object]:
    """Returns what the figures were measured on."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


class PeakMemory:
    """`with PeakMemory() as memory:` sets `memory.bytes`: peak RSS in the block less RSS before it.

    The kernel's high-water mark is reset at the start where it allows that; else it is the mark of
    the whole life of the process, so a side should do nothing larger before the block.
    """

    bytes = 0

    def __enter__(self) -> PeakMemory:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
        except OSError:
            print("the peak of the whole process counts: VmHWM cannot be reset", file=sys.stderr)
        self._before = status_bytes("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = max(0, status_bytes("VmHWM") - self._before)


def status_bytes(field: str) -> int:
    """Returns VmHWM (the most so far), VmRSS (now) or another size of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(f"/proc/self/status has no {field}")
