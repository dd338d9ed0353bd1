"""The words of `pocl-dist estimate`. Imports nothing heavy: `--help` shows them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return value


@dataclass(frozen=True)
class Options:
    """What the command line adds to the config."""

    nodes: int | None = None
    gpus_per_node: int | None = None
    device: str = "h100-80g"
    teacher: str | None = None
    student: str | None = None
    rows: int | None = None
    tokens_per_row: int | None = None
    response_tokens: int | None = None
    flops: float | None = None
    memory_gib: float | None = None
    intra_bandwidth: float | None = None
    inter_bandwidth: float | None = None
    json: bool = False


_SHAPE = "instead of the model's path: config.json, its folder, or hidden_size=4096,..."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the config and the options to the command's parser."""
    add = parser.add_argument
    add("config", nargs="+", metavar="CONFIG.yaml | section.key=value")
    add("--nodes", type=_positive, metavar="N", help="default: as engine.world_size needs")
    add("--gpus-per-node", type=_positive, metavar="G", help="ranks of a node; default: 8")
    add("--device", default="h100-80g", metavar="KIND", help="cpu, a100-40g, a100-80g, h100-80g, "
        "h200-141g, b200-180g or l40s-48g; cpu is measured, in a process of its own")  # fmt: skip
    add("--teacher", metavar="SHAPE", help=_SHAPE)
    add("--student", metavar="SHAPE", help="as --teacher")
    add("--rows", type=_positive, metavar="N", help="training rows, where data.train is not here")
    add("--tokens-per-row", type=_positive, metavar="L", help="prompt and response together")
    add("--response-tokens", type=_positive, metavar="R", help="of these; default: half")
    add("--flops", type=_rate, metavar="F", help="matrix products per second that a rank reaches")
    add("--memory-gib", type=_rate, metavar="M", help="memory of a device")
    add("--intra-bandwidth", type=_rate, metavar="GB/s", help="within a node, per device, one way")
    add("--inter-bandwidth", type=_rate, metavar="GB/s", help="between nodes, per device, one way")
    add("--json", action="store_true", help="one JSON object instead of tables")


def options_of(arguments: argparse.Namespace) -> Options:
    """Returns the options of a parsed command line."""
    return Options(**{name: getattr(arguments, name) for name in Options.__dataclass_fields__})
