"""How many GPUs a process started here would see; asked of the driver, not of torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path


def num_visible_gpus() -> int:
    """Returns the GPUs of this machine that CUDA_VISIBLE_DEVICES leaves visible."""
    here = _num_gpus()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return here
    names = [name.strip() for name in chosen.split(",")]
    if "-1" in names:  # and what comes after it
        names = names[: names.index("-1")]
    return min(here, len([name for name in names if name]))


@cache
def _num_gpus() -> int:
    program = shutil.which("nvidia-smi")
    if program is not None:
        try:
            told = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=10)
        except subprocess.TimeoutExpired:  # a driver that hangs has no usable GPU
            return 0
        if told.returncode == 0:
            return sum(line.startswith("GPU ") for line in told.stdout.splitlines())
    driver = Path("/proc/driver/nvidia/gpus")
    return len(list(driver.iterdir())) if driver.is_dir() else 0
