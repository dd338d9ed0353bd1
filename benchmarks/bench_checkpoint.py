"""How long training stands still for a checkpoint: asynchronous saving against synchronous.

Usage: python benchmarks/bench_checkpoint.py [--hidden 768] [--layers 6] [--ranks 2]

A Llama with random weights is fine-tuned on bundled rows under ZeRO-3 and saves every third step.
Prints one JSON object per side: means over all saves but the first (which opens the files of the
run), and the mean speed of the steps, which a write beside them lowers where cores are shared.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

ROOT = Path(__file__).parents[1]
BUNDLED = ROOT / "pocl_dist" / "bundled"


def write_student(folder: Path, hidden: int, layers: int) -> int:
    """Writes the model and its tokenizer; returns its number of parameters."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "student")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=4 * hidden,
        num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=8,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return int(model.num_parameters())


def measure(folder: Path, ranks: int, is_asynchronous: bool) -> dict[str, object]:
    """Trains 13 steps and returns the figures of the saves."""
    run = folder / f"asynchronous-{is_asynchronous}"
    words = [
        f"run_dir={run}", "models.teacher=null", f"models.student.path={folder / 'student'}",
        "models.student.init_layers=null", "curriculum.num_stages=1", "data.limit=104",
        "curriculum.visits_per_example=1", "curriculum.ordering=shuffled", "data.dev=null",
        f"engine.world_size={ranks}", "engine.global_batch_size=8", "engine.micro_batch_size=4",
        "checkpoint.every=3", "checkpoint.keep_last=1",
        f"checkpoint.asynchronous={json.dumps(is_asynchronous)}", "log.trackers=[]",
    ]  # fmt: skip
    for step in ("plan", "distill"):
        command = [sys.executable, "-m", "pocl_dist", step, str(ROOT / "configs/tiny_cpu.yaml")]
        subprocess.run([*command, *words], check=True, stdout=sys.stderr)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    saves = [row for row in rows if row["kind"] == "checkpoint"][1:]
    steps = [row for row in rows if row["kind"] == "step"][1:]
    shutil.rmtree(run)
    return {
        "asynchronous": is_asynchronous,
        "megabytes": round(saves[0]["bytes"] / 1e6, 1),
        "pause_seconds": round(statistics.mean(row["pause_seconds"] for row in saves), 2),
        "save_seconds": round(statistics.mean(row["seconds"] for row in saves), 2),
        "tokens_per_second": round(statistics.mean(row["tokens_per_second"] for row in steps)),
    }  # fmt: skip


def main() -> None:
    """Measures both sides."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = write_student(folder / "student", arguments.hidden, arguments.layers)
        print(json.dumps({"parameters": parameters, "ranks": arguments.ranks}), flush=True)
        for is_asynchronous in (False, True):
            print(json.dumps(measure(folder, arguments.ranks, is_asynchronous)), flush=True)


if __name__ == "__main__":
    main()
