"""`pocl-dist estimate` against what really happens: bytes of live tensors, seconds of a step.

    python benchmarks/validate_estimate.py memory [--ranks 1 2 4] [--stages 0 1 2 3] --json
    python benchmarks/validate_estimate.py time [--ranks 1 2] --json
    python benchmarks/validate_estimate.py page

Every row runs the distill step on real ranks (gloo) with a Llama pair of random weights. Memory:
the third step runs under a mode that follows every storage (`live_bytes.py`). Time: the CPU is
measured in the same invocation, right before and after the steps, so that other load meets both.
`memory` and `time` keep their rows in benchmarks/estimate.json; `page` writes docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from sides import run_ranks

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "benchmarks" / "estimate.json"
MEMORY_TOLERANCE, TIME_TOLERANCE = 0.10, 0.25
NUM_STEPS = 3
BUCKET = 10**6  # DeepSpeed's own 5e8 would hide all else of so small a model

SIZES = {
    # vocabulary, tokens of a row, rows of a micro-batch, (hidden, layers, ffn) of student, teacher
    "memory": (4096, 128, 4, (256, 4, 704), (384, 6, 1024)),
    "time": (8192, 128, 4, (384, 6, 1024), (512, 8, 1408)),
    "time, student heavy": (4096, 192, 2, (512, 10, 1408), (256, 4, 704)),
}


# ---------------------------------------------------------------------------------- models and rows


def write_inputs(folder: Path, size: str, num_rows: int) -> None:
    """Writes teacher, student and rows, each row as long as can be."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary, length, _, student, teacher = SIZES[size]
    words = {"<eos>": 0} | {f"w{number}": number for number in range(1, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    for name, (hidden, layers, ffn) in (("student", student), ("teacher", teacher)):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=ffn,
            num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4,
            max_position_embeddings=512, tie_word_embeddings=name == "student",
            bos_token_id=None, eos_token_id=0, pad_token_id=0,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    half = length // 2
    with (folder / "rows.jsonl").open("w") as handle:
        for row in range(num_rows):
            text = [f"w{1 + (7 * row + i) % (vocabulary - 1)}" for i in range(2 * length)]
            value = {
                "prompt": " ".join(text[:half]),
                "response": " ".join(text[half : half + length]),
            }
            handle.write(json.dumps(value) + "\n")


def config_words(folder: Path, size: str, world_size: int, stage: int, steps: int) -> list[str]:
    """Returns the config as overrides; two micro-batches per rank and step."""
    _, length, micro, _, _ = SIZES[size]
    batch = 2 * micro * world_size
    return [
        f"run_dir={folder / f'run-{world_size}-{stage}'}",
        f"models.teacher.path={folder / 'teacher'}",
        f"models.student.path={folder / 'student'}",
        f"data.train={folder / 'rows.jsonl'}",
        "data.template='{prompt}'",
        f"data.max_tokens={length}",
        f"data.max_prompt_tokens={length // 2}",
        "curriculum.num_stages=1",
        f"curriculum.epochs_per_stage={steps * batch / num_rows(size)}",
        f"engine.world_size={world_size}",
        f"engine.zero_stage={stage}",
        f"engine.micro_batch_size={micro}",
        f"engine.global_batch_size={batch}",
        f"engine.zero_options.reduce_bucket_size={BUCKET}",
        "engine.zero_options.stage3_param_persistence_threshold=0",
        "engine.dtype=fp32",
        "loss.compile=never",
        "log.trackers=[]",
    ]


def num_rows(size: str) -> int:
    """Returns the rows of the file: enough for a step of the most ranks."""
    return 8 * SIZES[size][2]


# -------------------------------------------------------------------------------------------- ranks


def run_rank(words: list[str], is_memory: bool) -> dict[str, object]:
    """Runs distill on this rank; returns seconds of its steps, or bytes of the last. Collective."""
    from live_bytes import LiveBytes, SavedBytes

    from pocl_dist.config import load_config
    from pocl_dist.distributed.memory import held_bytes
    from pocl_dist.models.heads import backbone_module
    from pocl_dist.pipeline import distill
    from pocl_dist.pipeline.run_directory import RunDirectory

    config = load_config([], words)
    seconds: list[float] = []
    found: dict[str, object] = {"seconds": seconds}
    step = distill.train_step

    def watched(engine, *arguments):  # type: ignore[no-untyped-def]
        started = time.perf_counter()
        if not is_memory or len(seconds) < NUM_STEPS - 1:
            result = step(engine, *arguments)
        else:
            saved: list[int] = []
            backbone = backbone_module(engine.module.model)
            forward = backbone.forward

            def counted(*args, **kwargs):  # type: ignore[no-untyped-def]
                with SavedBytes(engine.module.parameters()) as bytes_saved:
                    output = forward(*args, **kwargs)
                saved.append(bytes_saved.bytes)
                return output

            held: list[int] = []
            backward = engine.backward

            def noted(*args, **kwargs):  # type: ignore[no-untyped-def]
                result = backward(*args, **kwargs)
                held.append(held_bytes(engine).gradients)
                return result

            backbone.forward, engine.backward = counted, noted
            with LiveBytes() as live:
                result = step(engine, *arguments)
            found["gradients"] = max(held)  # they are most between the micro-batches
            found["held"] = asdict(held_bytes(engine))
            found.update(peak=live.peak, activations=max(saved), largest=live.largest)
            backbone.forward, engine.backward = forward, backward
        seconds.append(time.perf_counter() - started)
        return result

    distill.train_step = watched
    distill.distill_rank(config, RunDirectory(Path(config.run_dir)))
    return found


def ranks_found(words: list[str], world_size: int, *, is_memory: bool) -> list[dict[str, object]]:
    """Returns what each of `world_size` ranks found."""
    arguments = ["rank", "--words", json.dumps([is_memory, *words])]
    return run_ranks(__file__, arguments, world_size, 28900 + os.getpid() % 500)


def plan(words: list[str]) -> None:
    """Writes the plan that distill reads."""
    command = [sys.executable, "-m", "pocl_dist", "plan", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


# --------------------------------------------------------------------------------------- comparison


def estimated(words: list[str], world_size: int, *, flops: float | None):  # type: ignore[no-untyped-def]
    """Returns the estimate on this machine; without `flops` it is measured now."""
    from pocl_dist.cluster.estimate.arguments import Options
    from pocl_dist.cluster.estimate.estimate import make_estimate
    from pocl_dist.cluster.estimate.inputs import make_setup

    options = Options(device="cpu", nodes=1, gpus_per_node=world_size, flops=flops)
    return make_estimate(make_setup(words, options))


def memory_row(folder: Path, world_size: int, stage: int) -> dict[str, object]:
    """Returns bytes by part, predicted and measured, of the rank with most."""
    words = config_words(folder, "memory", world_size, stage, NUM_STEPS)
    plan(words)
    ranks = ranks_found(words, world_size, is_memory=True)
    found = estimated(words, world_size, flops=1e10)
    parts = next(phase for phase in found.phases if phase.name == "loss and backward").parts
    measured = {
        "parameters": max(row["held"]["parameters"] for row in ranks),  # type: ignore[index]
        "gradients": max(row["gradients"] for row in ranks),  # type: ignore[type-var]
        "optimizer": max(row["held"]["optimizer"] for row in ranks),  # type: ignore[index]
        "activations": max(row["activations"] for row in ranks),  # type: ignore[type-var]
        "peak": max(row["peak"] for row in ranks),  # type: ignore[type-var]
    }
    predicted = {name: parts[name] for name in measured if name != "peak"}
    predicted["peak"] = found.peak.total
    return {
        "world_size": world_size,
        "zero_stage": stage,
        "phase": found.peak.name,
        "predicted": predicted,
        "measured": measured,
        "parts": dict(found.peak.parts),
        "largest": ranks[0]["largest"],
    }


def time_row(folder: Path, size: str, world_size: int, stage: int) -> dict[str, object]:
    """Returns seconds of a step, predicted and measured; the CPU is measured before and after."""
    steps = 8
    words = config_words(folder, size, world_size, stage, steps)
    plan(words)
    before = estimated(words, world_size, flops=None)
    ranks = ranks_found(words, world_size, is_memory=False)
    after = estimated(words, world_size, flops=None)
    seconds = sorted(max(row["seconds"][i] for row in ranks) for i in range(2, steps))  # type: ignore[index]
    predicted = (before.step.total + after.step.total) / 2
    return {
        "size": size,
        "world_size": world_size,
        "zero_stage": stage,
        "predicted": predicted,
        "predicted_before": before.step.total,
        "predicted_after": after.step.total,
        "measured": seconds[len(seconds) // 2],
        "all_seconds": seconds,
        "parts": asdict(after.step),
        "flops_per_second": after.setup.device.flops["fp32"],
        "load": os.getloadavg()[0],
    }


def differences(row: dict[str, object]) -> dict[str, float]:
    """Returns predicted over measured, less 1."""
    predicted, measured = row["predicted"], row["measured"]
    if isinstance(predicted, float):
        return {"step": predicted / measured - 1}  # type: ignore[operator]
    return {name: predicted[name] / measured[name] - 1 for name in measured}  # type: ignore[index,attr-defined]


def keep(kind: str, row: dict[str, object]) -> None:
    """Writes a row among those that are kept, in place of an earlier one of the same run."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    rows = [old for old in kept.get(kind, []) if _name(old) != _name(row)] + [row]
    kept[kind] = sorted(rows, key=_name)
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")


def _name(row: dict[str, object]) -> tuple[object, ...]:
    return (row.get("size", ""), row["world_size"], row["zero_stage"])


def main() -> None:
    """Runs what is asked for; exits 1 when a memory row is off by more than a tenth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("memory", "time", "page", "rank"))
    parser.add_argument("--ranks", nargs="+", type=int)
    parser.add_argument("--stages", nargs="+", type=int)
    parser.add_argument("--sizes", nargs="+", default=["time", "time, student heavy"])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--words", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    sys.path.insert(0, str(ROOT))
    if arguments.what == "rank":
        print(json.dumps(run_rank(arguments.words[1:], arguments.words[0])))
        return
    if arguments.what == "page":
        from scaling_page import write_page

        write_page(json.loads(KEPT.read_text()))
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size in ["memory"] if arguments.what == "memory" else arguments.sizes:
            inputs = folder / size.replace(", ", "-").replace(" ", "-")
            inputs.mkdir()
            write_inputs(inputs, size, num_rows(size))
            for world_size in arguments.ranks or ([1, 2, 4] if size == "memory" else [1, 2]):
                for stage in arguments.stages or ([0, 1, 2, 3] if size == "memory" else [0, 3]):
                    row = (
                        memory_row(inputs, world_size, stage)
                        if size == "memory"
                        else time_row(inputs, size, world_size, stage)
                    )
                    rows.append(row)
                    keep(arguments.what, row)
                    shown = {k: f"{v:+.1%}" for k, v in differences(row).items()}
                    print(f"{size}, {world_size} ranks, stage {stage}: {shown}", file=sys.stderr)
                    if arguments.json:
                        print(json.dumps(row), flush=True)
    tolerance = MEMORY_TOLERANCE if arguments.what == "memory" else TIME_TOLERANCE
    worst = max(abs(value) for row in rows for value in differences(row).values())
    if worst > tolerance:
        raise SystemExit(f"a row is off by {worst:.0%}")


if __name__ == "__main__":
    main()
