"""What one rank puts into a checkpoint: its size, the copy in host memory, the file."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pocl_dist import __version__
from pocl_dist.distributed.checkpoint import WEIGHTS
from pocl_dist.distributed.engine import MOMENTS
from pocl_dist.distributed.parameters import (
    master_parameters,
    moments,
    shape_of,
    trained_parameters,
)
from pocl_dist.distributed.process_group import Rank
from pocl_dist.failpoints import failpoint
from pocl_dist.files import JSONValue, sha256_file

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_BYTES_PER_PARAMETER = 12  # fp32 weight and two moments
_BYTES_PER_TENSOR = 256  # its entry in the header of the file


def package_versions() -> dict[str, JSONValue]:
    """Returns what a checkpoint was written with; another may compute other bits."""
    names = ("torch", "deepspeed", "transformers", "safetensors")
    return {
        "pocl_dist": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def num_bytes_of(engine: DeepSpeedEngine, extra: Mapping[str, torch.Tensor]) -> int:
    """Returns what a checkpoint will take on disk, all ranks together, a little rounded up."""
    sizes = [shape_of(parameter).numel() for _, parameter in trained_parameters(engine.module)]
    num_tensors = (1 + len(MOMENTS)) * len(sizes) + len(extra)
    num_extra = sum(tensor.numel() * tensor.element_size() for tensor in extra.values())
    return _BYTES_PER_PARAMETER * sum(sizes) + _BYTES_PER_TENSOR * num_tensors + num_extra


def collect_share(engine: DeepSpeedEngine, rank: Rank) -> dict[str, torch.Tensor]:
    """Returns this rank's share of all tensors, copied to the CPU. Collective."""
    share = {}
    sources = [
        (WEIGHTS, master_parameters(engine)),
        *((key, moments(engine, key)) for key in MOMENTS),
    ]
    for kind, named in sources:
        for turn, (name, value) in enumerate(named):
            if turn % rank.world_size == rank.index:
                share[f"{kind}.{name}"] = value.detach().to("cpu", copy=True).contiguous()
    return share


def write_share(share: dict[str, torch.Tensor], file: Path) -> dict[str, JSONValue]:
    """Writes one rank's tensors; returns the file's row of the manifest."""
    from safetensors.torch import save_file

    failpoint("checkpoint.before_write")
    save_file(share, file)
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())
    digest = sha256_file(file)
    failpoint("checkpoint.after_write")
    return {"path": file.name, "bytes": file.stat().st_size, "sha256": digest}
