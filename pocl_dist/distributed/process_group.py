"""This process among the ranks: who it is, on which device, and how it joins."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch

from pocl_dist.errors import ConfigError, UnavailableError, WorkerError

if not torch.cuda.is_available():  # read by deepspeed when it is first imported
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


@dataclass(frozen=True)
class Rank:
    """One process of a run."""

    index: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Returns whether this rank decides, logs and writes."""
        return self.index == 0


def is_launched() -> bool:
    """Returns whether a launcher (deepspeed, torchrun, srun wrapper) started this as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def place_on_node() -> tuple[int, int]:
    """Returns (index of this rank on its node, ranks there), as the launcher's variables say.

    Of a launcher that does not tell, each rank is a node of its own.
    """
    num_here = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))
    if num_here is None or "LOCAL_RANK" not in os.environ:
        return 0, 1
    return int(os.environ["LOCAL_RANK"]), int(num_here)


def join_process_group(timeout_seconds: float) -> Rank:
    """Joins the process group of the launcher's variables (alone without them). Collective.

    gloo on CPU, nccl on GPU. A collective that waits longer than `timeout_seconds` raises.
    """
    # torch warns, once per rank and call site, of names that DeepSpeed still uses.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    from deepspeed import ops

    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        # An optional all-reduce kernel that DeepSpeed would compile for 80 s; results are the same.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not is_launched():
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if has_gpu and "LOCAL_RANK" not in os.environ and os.environ["WORLD_SIZE"] != "1":
        raise ConfigError("LOCAL_RANK is not set: all ranks of this host would take its first GPU")
    device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    else:
        ranks_here = int(
            os.environ.get(
                "LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"])
            )
        )
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if has_gpu else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=timeout_seconds),
        )
    except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UnavailableError(
            f"rank {os.environ['RANK']} could not join the others at {address}: {error}"
        ) from error
    return Rank(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


_LOST_PEER = (
    "closed by peer",
    "timed out",
    "timeout",
    "connection reset",
    "broken pipe",
    "nccl",
    "gloo",
)


@contextmanager
def lost_peers_named(rank: Rank, missing: Callable[[], str] = str) -> Iterator[None]:
    """Turns the error of a collective whose peer died or hung into a WorkerError (71).

    `missing` is asked for a line that names the peer.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "engine.micro_batch_size: the step does not fit into the memory of rank "
            f"{rank.index}'s device; lower it, or set engine.gradient_checkpointing: true"
        ) from error
    except RuntimeError as error:
        if any(sign in str(error).lower() for sign in _LOST_PEER):
            line = str(error).strip().splitlines()[0]
            named = missing()
            raise WorkerError(f"rank {rank.index} lost another rank: {named or line}") from error
        raise


def torch_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Returns the torch dtype of `engine.dtype`; None means bf16 on GPU, fp32 on CPU."""
    if name is None:
        name = "bf16" if device.type == "cuda" else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise ConfigError("engine.dtype: 'fp16' is not possible on CPU: use fp32 or bf16")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
