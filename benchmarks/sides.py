"""What the benchmarks share: a side in a process of its own, the machine, peak memory of some work.

A script calls itself through `run_side` with arguments that name one side; that child prints one
JSON object as its last line.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch

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


def machine() -> dict[str, object]:
    """Returns what the figures were measured on."""
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
        self._before = _status_bytes("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = max(0, _status_bytes("VmHWM") - self._before)


def peak_rss_bytes() -> int:
    """Returns the largest RSS that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(f"/proc/self/status has no {field}")
