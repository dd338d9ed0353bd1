"""What a device can do: memory, speed, links. Figures of the makers, one direction, per device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

GIB = 2**30
GB = 10**9


@dataclass(frozen=True)
class Link:
    """What connects two devices."""

    bytes_per_second: float  # in one direction, as a collective reaches it
    latency_seconds: float  # of one message


@dataclass(frozen=True)
class Device:
    """One rank's device. `reserved_bytes`: context, NCCL, fragments; no tensor can have them."""

    name: str
    memory_bytes: int
    reserved_bytes: int
    flops: Mapping[str, float]  # of matrix products by dtype, per second, dense
    product_efficiency: float  # share of `flops` that large products reach
    bytes_per_second: float  # of the memory, as element-wise work reaches it
    intra: Link
    inter: Link
    host_bytes_per_second: float  # between host and device memory
    op_seconds: float  # to start one operation from Python
    logit_seconds: float  # of the element-wise part of the loss, per logit
    devices_per_node: int
    source: str
    overlaps: bool = True  # communication runs beside computation
    copy_bytes_per_second: float | None = None  # into new memory; None: as all else

    @property
    def is_cpu(self) -> bool:
        """Returns whether this is no accelerator."""
        return self.name == "cpu"

    @property
    def usable_bytes(self) -> int:
        """Returns what tensors can have."""
        return self.memory_bytes - self.reserved_bytes


# NCCL reaches about this share of a link (nccl-tests' bus bandwidth on HGX H100: 360 to 370 GB/s of
# 450 with NVLink, 45 of 50 with NDR InfiniBand); element-wise kernels about the same of the memory.
_REACHED = 0.8
_PCIE = {4: 25 * GB, 5: 50 * GB}  # x16, as pinned copies reach it
_NVLINK_LATENCY, _NETWORK_LATENCY = 5e-6, 15e-6
# PyTorch's eager mode starts an operation, autograd included, in so long on a server's CPU.
_OP_SECONDS = 8e-6
# Five passes over the memory, fused (losses/compiled.py), four bytes each, read and written.
_BYTES_PER_LOGIT = 40


def _gpu(
    name: str,
    memory_gb: float,
    bf16: float,
    fp32: float,
    memory_gb_per_s: float,
    link_gb_per_s: float,
    network_gb_per_s: float,
    pcie: int,
    source: str,
) -> Device:
    """Returns a GPU: memory in GB, teraflops, GB/s of memory, of its link and of its network."""
    bandwidth = _REACHED * memory_gb_per_s * GB
    return Device(
        name=name,
        memory_bytes=int(memory_gb * GB),
        reserved_bytes=int(1.5 * GIB + 0.04 * memory_gb * GB),
        flops=MappingProxyType({"bf16": bf16 * 1e12, "fp16": bf16 * 1e12, "fp32": fp32 * 1e12}),
        product_efficiency=0.65,
        bytes_per_second=bandwidth,
        intra=Link(_REACHED * link_gb_per_s * GB, _NVLINK_LATENCY),
        inter=Link(_REACHED * network_gb_per_s * GB, _NETWORK_LATENCY),
        host_bytes_per_second=_PCIE[pcie],
        op_seconds=_OP_SECONDS,
        logit_seconds=_BYTES_PER_LOGIT / bandwidth,
        devices_per_node=8,
        source=source,
    )


_DGX = "{0} data sheet ({1}); NVLink {2} GB/s both ways; {3} Gb/s InfiniBand per GPU"
DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        device.name: device
        for device in (
            _gpu("a100-40g", 40, 312, 19.5, 1555, 300, 25, 4,
                 _DGX.format("NVIDIA A100", "SXM4 40 GB, dense", 600, "DGX A100: 200")),
            _gpu("a100-80g", 80, 312, 19.5, 2039, 300, 25, 4,
                 _DGX.format("NVIDIA A100", "SXM4 80 GB, dense", 600, "DGX A100: 200")),
            _gpu("h100-80g", 80, 989, 67, 3350, 450, 50, 5,
                 _DGX.format("NVIDIA H100", "SXM5, dense", 900, "DGX H100: 400")),
            _gpu("h200-141g", 141, 989, 67, 4800, 450, 50, 5,
                 _DGX.format("NVIDIA H200", "SXM5, dense", 900, "DGX H200: 400")),
            _gpu("b200-180g", 180, 2250, 75, 8000, 900, 50, 5,
                 _DGX.format("NVIDIA DGX B200", "dense", 1800, "400")),
            _gpu("l40s-48g", 48, 362, 91.6, 864, 25, 12.5, 4,
                 "NVIDIA L40S data sheet (dense); PCIe 4 x16; one 400 Gb/s port for four assumed"),
        )
    }
)  # fmt: skip
"""The device kind `cpu` is no row of this table: it is measured (`cpu.py`)."""
