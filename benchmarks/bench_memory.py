"""Bytes per rank of parameters, gradients and optimizer state at ZeRO stages 0 to 3, measured.

    python benchmarks/bench_memory.py [--ranks 1 2 4] [--hidden 512] --json

Every row trains one step of a Llama with random weights on real ranks (gloo) and counts what the
engine holds: gradients after each of two micro-batches (the most), the rest after the update.
`expected_bytes` is the formula beside it; a difference of more than a tenth is an error. `markdown`
holds the table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

from sides import machine, run_ranks

TOLERANCE = 0.1


def measure_rank(zero_stage: int, hidden: int) -> dict[str, object]:
    """Takes one step on this rank; returns what it held and what the formula says. Collective."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pocl_dist.config import LossConfig, load_config
    from pocl_dist.distributed.engine import build_student_engine
    from pocl_dist.distributed.memory import held_bytes
    from pocl_dist.distributed.process_group import join_process_group
    from pocl_dist.distributed.zero_bytes import expected_bytes
    from pocl_dist.pipeline.student import StudentWithLoss
    from pocl_dist.records import TeacherOutput

    rank = join_process_group(120)
    keys = {"run_dir": "none", "models.student.path": "none", "data.train": "none"}
    keys |= {"engine.zero_stage": zero_stage, "engine.dtype": "fp32"}
    overrides = [f"{key}={value}" for key, value in keys.items()]
    # Small parameters stay whole under ZeRO-3 for speed; this table is about partitioning.
    overrides.append("engine.zero_options={stage3_param_persistence_threshold: 0}")
    config = load_config([], [*overrides, "models.teacher=null"])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=8,
        )
    )
    num_parameters = sum(p.numel() for p in model.parameters())
    module = StudentWithLoss(model, LossConfig(), 1024)
    module.kd_ratio = 0.0
    engine = build_student_engine(module, config, rank)
    ids = torch.arange(16)[None]
    gradients = []
    for is_last in (False, True):
        engine.set_gradient_accumulation_boundary(is_last)
        loss, _ = engine(ids, None, ids, TeacherOutput())
        engine.backward(loss)
        gradients.append(held_bytes(engine).gradients)
        engine.step()
    return {
        "num_parameters": num_parameters,
        "held_bytes": asdict(replace(held_bytes(engine), gradients=max(gradients))),
        "expected_bytes": asdict(expected_bytes(num_parameters, zero_stage, rank.world_size)),
    }


def measure(world_size: int, zero_stage: int, hidden: int) -> dict[str, object]:
    """Returns a row of the table: the largest figures among the ranks."""
    arguments = ["--stage", str(zero_stage), "--hidden", str(hidden)]
    found = run_ranks(__file__, arguments, world_size, 28400 + os.getpid() % 500)
    held = {kind: max(row["held_bytes"][kind] for row in found) for kind in found[0]["held_bytes"]}
    return {"world_size": world_size, "zero_stage": zero_stage, **found[0], "held_bytes": held}


def differences(row: dict[str, object]) -> dict[str, float]:
    """Returns measured over expected, less 1, for each kind of tensor."""
    held, expected = row["held_bytes"], row["expected_bytes"]
    return {kind: held[kind] / expected[kind] - 1 for kind in expected}  # type: ignore[index]


def markdown(rows: list[dict[str, object]]) -> str:
    """Returns the table, in MiB, measured / formula."""
    kinds = ("parameters", "gradients", "optimizer")
    lines = ["| ranks | ZeRO | " + " | ".join(kinds) + " |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [
            f"{row['held_bytes'][kind] / 2**20:.1f} / {row['expected_bytes'][kind] / 2**20:.1f}"  # type: ignore[index]
            for kind in kinds
        ]
        lines.append(f"| {row['world_size']} | {row['zero_stage']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures all rows, or one rank of a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--json", action="store_true", help="only the last line, one JSON object")
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # The checkout that this file lies in is measured, whatever is installed.
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    if arguments.stage is not None:
        print(json.dumps(measure_rank(arguments.stage, arguments.hidden)))
        return
    rows = []
    for world_size in arguments.ranks:
        for stage in range(4):
            rows.append(measure(world_size, stage, arguments.hidden))
            print(f"{world_size} ranks, stage {stage}: {differences(rows[-1])}", file=sys.stderr)
    table = markdown(rows)
    if not arguments.json:
        print(table)
    worst = max(abs(value) for row in rows for value in differences(row).values())
    result = {"benchmark": "memory", "machine": machine(), "rows": rows, "markdown": table}
    print(json.dumps(result | {"ratios": {"largest_difference_from_formula": worst}}))
    if worst > TOLERANCE:
        raise SystemExit(f"a row is off by {worst:.0%}")


if __name__ == "__main__":
    main()
