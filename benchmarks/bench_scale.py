"""Time and memory of reading, planning and feeding a rank, from ten thousand to ten million rows.

Usage: python benchmarks/bench_scale.py [--rows N ...] [--shard-size 4096] [--folder DIR] [--json]

For each size synthetic rows without ids (250 bytes each), then in a process of its own each:
read    what the first step does with data.train: check every row, give ids, write them for later
scores  what measure leaves, made up (not timed)
plan    `pocl-dist plan`: join, rank, fuse, cut, write
rank    what a rank of distill does with rows: open them, take the plan's ranking, and for 1,600
        steps of 64 rows sample, read, encode, lay out and pad
Memory is the process's own high-water mark (VmHWM of /proc/self/status), libraries included; of a
rank what it took beyond the state after its imports. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sides import status_bytes

ROOT = Path(__file__).parents[1]
ROWS = [10**4, 10**5, 10**6, 10**7]
NUM_STEPS = 1600
BATCH = 64
WORDS = [
    a + b for a in ("ka", "mo", "ri", "tel", "su", "pan") for b in ("do", "na", "lis", "ve", "t")
]


def write_source(path: Path, num_rows: int) -> None:
    """Writes rows of two sentences; a hundredth of them stand twice."""
    generator = random.Random(7)
    pool = [" ".join(generator.choices(WORDS, k=generator.randint(8, 28))) for _ in range(4096)]
    with path.open("w") as handle:
        for start in range(0, num_rows, 10_000):
            lines = []
            for index in range(start, min(start + 10_000, num_rows)):
                number = index - 1 if index % 100 == 99 else index
                a, b = pool[number * 7 % 4096], pool[number // 4096 % 4096]
                lines.append(f'{{"instruction": "{a} {number}", "input": "", "output": "{b}"}}\n')
            handle.write("".join(lines))


def config_of(folder: Path) -> object:
    """Returns the config of the run in `folder`."""
    from pocl_dist.config import load_config

    words = [
        f"run_dir={folder / 'run'}", f"data.train={folder / 'rows.jsonl'}", "data.limit=null",
        "data.dev=null", f"engine.global_batch_size={BATCH}", "curriculum.ordering=curriculum",
        "curriculum.num_stages=4",
    ]  # fmt: skip
    return load_config(["tiny_cpu.yaml"], words)


def read(folder: Path) -> dict[str, object]:
    """Reads the source as the first step of a run does."""
    from pocl_dist.pipeline.inputs import read_train

    started = time.monotonic()
    rows = read_train(config_of(folder))
    return {"seconds": time.monotonic() - started, "rows": len(rows.examples)}


def scores(folder: Path, shard_size: int) -> dict[str, object]:
    """Writes difficulty shards as measure does, with made-up scores; many tie in ROUGE-L."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pocl_dist.data.columns import number_array, text_array
    from pocl_dist.files import atomic_write_json
    from pocl_dist.pipeline.difficulty_files import config_inputs
    from pocl_dist.pipeline.inputs import read_train
    from pocl_dist.pipeline.run_directory import RunDirectory
    from pocl_dist.shard_files import write_shard

    config = config_of(folder)
    run, rows = RunDirectory(Path(config.run_dir)), read_train(config)
    atomic_write_json(run.difficulty / "inputs.json", config_inputs(config, rows))
    ids = rows.ids()
    generator = np.random.default_rng(3)
    order = generator.permutation(len(ids))
    for start in range(0, len(ids), shard_size):
        part = order[start : start + shard_size]
        buffer = io.BytesIO()
        table = {
            "example_id": ids.take(number_array(part)).cast(pa.string()),
            "rouge_l": number_array(np.round(generator.random(len(part)), 3)),
            "cross_entropy": number_array(generator.random(len(part)) * 5),
            "num_response_tokens": number_array(np.full(len(part), 20)),
            "answer": text_array(["an answer of some words"] * len(part)).cast(pa.string()),
        }
        pq.write_table(pa.table(table), buffer)
        write_shard(run.difficulty / f"shard-{start // 32:05d}.parquet", buffer.getvalue())
    return {"shards": -(-len(ids) // shard_size)}


def plan(folder: Path) -> dict[str, object]:
    """Plans."""
    from pocl_dist.pipeline.plan import make_plan
    from pocl_dist.pipeline.run_directory import RunDirectory

    config = config_of(folder)
    started = time.monotonic()
    made = make_plan(config, RunDirectory(Path(config.run_dir)))
    return {"seconds": time.monotonic() - started, "ranked": len(made.ranking)}


def rank(folder: Path) -> dict[str, object]:
    """Takes batches as a rank of two does, by the functions that it calls."""
    from pocl_dist.data.batching import padded_layout
    from pocl_dist.data.encoding import collate, pad_id_of
    from pocl_dist.data.sampler import StageSampler
    from pocl_dist.models.loading import load_tokenizer
    from pocl_dist.models.sources import ModelFolder
    from pocl_dist.pipeline.inputs import make_encoder, read_train
    from pocl_dist.pipeline.plan_files import plan_digest, ranked_rows, read_plan
    from pocl_dist.pipeline.run_directory import RunDirectory
    from pocl_dist.pipeline.train_rows import EncodedRows

    config = config_of(folder)
    student = ROOT / "pocl_dist" / "bundled" / "student"
    tokenizer = load_tokenizer(ModelFolder(student, "student"))
    encoder = make_encoder(config, tokenizer)
    before = status_bytes("VmRSS")
    started = time.monotonic()
    made = read_plan(RunDirectory(Path(config.run_dir)).plan)
    plan_digest(made)
    rows = read_train(config, is_read=True)
    examples = EncodedRows(rows, encoder, ranked_rows(made, rows))
    opened = time.monotonic()
    stage = made.stages[-1]
    sampler = StageSampler(config.seed, stage.index, stage.num_examples, stage.epochs, BATCH)
    num_tokens = 0
    for step in range(min(NUM_STEPS, sampler.num_steps)):
        batch = [examples[position] for position in sampler.batch(step)]
        lengths = [len(example.token_ids) - 1 for example in batch]
        for part in padded_layout(lengths, 2, 8, config.engine.max_waste)[0]:
            num_tokens += collate([batch[i] for i in part], pad_id_of(tokenizer)).num_tokens
    return {
        "open_seconds": opened - started,
        "milliseconds_per_step": 1000 * (time.monotonic() - opened) / (step + 1),
        "steps": step + 1,
        "tokens": num_tokens,
        "grown_bytes": status_bytes("VmHWM") - before,
    }


def run_phase(name: str, folder: Path, shard_size: int) -> dict[str, object]:
    """Runs a phase in a process of its own; returns what it tells, with its peak memory."""
    command = [sys.executable, __file__, "--phase", name, "--folder", str(folder)]
    done = subprocess.run(
        [*command, "--shard-size", str(shard_size)], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {json.dumps(found)}", flush=True)
    return found


def measure(folder: Path, num_rows: int, shard_size: int) -> dict[str, object]:
    """Returns the figures of one size."""
    print(f"== {num_rows} rows", flush=True)
    write_source(folder / "rows.jsonl", num_rows)
    phases = {
        name: run_phase(name, folder, shard_size) for name in ("read", "scores", "plan", "rank")
    }
    read_seconds, plan_seconds = (float(phases[name]["seconds"]) for name in ("read", "plan"))
    peaks = [int(phases[name]["peak_bytes"]) for name in ("read", "plan")]
    return {
        "rows": num_rows,
        "source_bytes": (folder / "rows.jsonl").stat().st_size,
        "read_seconds": read_seconds,
        "plan_seconds": plan_seconds,
        "read_and_plan_seconds": read_seconds + plan_seconds,
        "read_and_plan_cpu_seconds": sum(
            float(phases[name]["cpu_seconds"]) for name in ("read", "plan")
        ),  # where others keep the cores busy, this tells more than the clock
        "read_gib": peaks[0] / 2**30,
        "plan_gib": peaks[1] / 2**30,
        "largest_gib": max(peaks) / 2**30,
        "rank_mib": int(phases["rank"]["grown_bytes"]) / 2**20,
        "rank_open_seconds": phases["rank"]["open_seconds"],
        "rank_milliseconds_per_step": phases["rank"]["milliseconds_per_step"],
        "shards": phases["scores"]["shards"],
    }


def main() -> None:
    """Measures all sizes, or runs one phase."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--shard-size", type=int, default=4096)
    parser.add_argument(
        "--folder", type=Path, help="where the rows are written; else a temporary one"
    )
    parser.add_argument("--phase", choices=["read", "scores", "plan", "rank"])
    parser.add_argument("--json", action="store_true", help="as the others; it always is")
    arguments = parser.parse_args()
    if arguments.phase == "scores":
        print(json.dumps(scores(arguments.folder, arguments.shard_size)))
        return
    if arguments.phase:
        found = {"read": read, "plan": plan, "rank": rank}[arguments.phase](arguments.folder)
        used = {"cpu_seconds": time.process_time(), "peak_bytes": status_bytes("VmHWM")}
        print(json.dumps({**found, **used}))
        return
    sizes = []
    for num_rows in sorted(arguments.rows):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            sizes.append(measure(Path(name), num_rows, arguments.shard_size))
    first, last = sizes[0], sizes[-1]
    growth = float(last["rank_mib"]) - float(first["rank_mib"])
    print(json.dumps({"sizes": sizes, "largest": last, "rank_growth_mib": growth}))


if __name__ == "__main__":
    main()
