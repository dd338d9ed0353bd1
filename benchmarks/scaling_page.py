"""Fills docs/scaling.md: the tables between its markers, from kept rows and from the command."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scaling.md"
LLAMA = "num_key_value_heads=8,vocab_size=128256"
PLAN = [
    "estimate",
    "configs/llama_70b.yaml",
    "--nodes", "8", "--gpus-per-node", "8", "--device", "h100-80g",
    "--teacher",
    f"hidden_size=8192,num_hidden_layers=80,num_attention_heads=64,intermediate_size=28672,{LLAMA}",
    "--student",
    f"hidden_size=4096,num_hidden_layers=32,num_attention_heads=32,intermediate_size=14336,{LLAMA}",
    "--rows", "10000000", "--tokens-per-row", "800", "--response-tokens", "400",
]  # fmt: skip


def _mib(value: float) -> str:
    return f"{value / 2**20:.1f}"


def memory_table(rows: list[dict]) -> str:
    """Returns predicted / measured MiB of a rank, and the difference of the peaks."""
    parts = ("parameters", "gradients", "optimizer", "activations", "peak")
    lines = [f"| ranks | ZeRO | {' | '.join(parts)} | peak, off by |", "|---" * 8 + "|"]
    for row in rows:
        cells = [f"{_mib(row['predicted'][p])} / {_mib(row['measured'][p])}" for p in parts]
        off = row["predicted"]["peak"] / row["measured"]["peak"] - 1
        cells.append(f"{off:+.1%}")
        lines.append(f"| {row['world_size']} | {row['zero_stage']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def time_table(rows: list[dict]) -> str:
    """Returns seconds of a step, predicted before and after the steps, and measured."""
    if not rows:
        return "Not measured yet: the machine was never quiet enough, so no row stands here."
    lines = [
        "| pair | ranks | ZeRO | predicted before | after | mean | measured | off by |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        off = row["predicted"] / row["measured"] - 1
        cells = [
            row["size"],
            str(row["world_size"]),
            str(row["zero_stage"]),
            *(
                f"{row[key]:.3f} s"
                for key in ("predicted_before", "predicted_after", "predicted", "measured")
            ),
            f"{off:+.0%}" if abs(off) <= 0.25 else f"**{off:+.0%}**",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plan_text() -> str:
    """Returns the command of the large plan and what it prints."""
    command = [sys.executable, "-m", "pocl_dist", *PLAN]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    shown = " ".join(PLAN).replace(" --", " \\\n    --")
    return f"```console\n$ pocl-dist {shown}\n{done.stdout.rstrip()}\n```"


def write_page(kept: dict[str, list[dict]]) -> None:
    """Replaces what stands between the markers of docs/scaling.md."""
    blocks = {
        "memory": memory_table(kept["memory"]),
        "time": time_table(kept.get("time", [])),
        "plan": plan_text(),
    }
    text = PAGE.read_text()
    for name, block in blocks.items():
        marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.escape(marks[0]) + ".*?" + re.escape(marks[1])
        new = f"{marks[0]}\n{block}\n{marks[1]}"
        text, count = re.subn(pattern, lambda _, new=new: new, text, flags=re.S)
        if count != 1:
            raise SystemExit(f"{PAGE}: the marker {marks[0]} must stand there once")
    PAGE.write_text(text)
