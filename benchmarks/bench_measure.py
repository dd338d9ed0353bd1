"""The difficulty pass against the straightforward loop: same student, rows, answers and scores.

    .venv/bin/python benchmarks/bench_measure.py --data rows.jsonl [--rows 128] --json

The straightforward loop is what a user writes first: the rows in the order of the data set, batches
of 16 padded to the longest that the config allows, one forward for the cross-entropy, one
`generate` for the answers, all threads. Ours is `pocl-dist measure` with configs/smollm2_cpu.yaml:
its time is given with Ray's start, the actors' imports and the loading of the model, and without
(from the first shard's start to the last one's end). Answers are greedy, in fp32, with the same
bound on new tokens. The scores have to agree before any ratio is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from sides import PeakMemory, machine, run_side

from pocl_dist.config import Config, load_config
from pocl_dist.difficulty.work import WorkShard
from pocl_dist.difficulty.worker import ModelWorker, ShardResult
from pocl_dist.files import read_json_lines
from pocl_dist.metrics import rouge_l
from pocl_dist.pipeline.inputs import make_encoder, read_train, student_source
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.records import DifficultyRecord

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]
STRAIGHT_BATCH = 16
# Sums of thousands of fp32 products in another order: 1.1e-5 was the largest of 128 rows.
CROSS_ENTROPY_TOLERANCE = 2e-5


@dataclass(frozen=True)
class Score:
    """What both sides say of a row."""

    answer: str
    rouge_l: float
    cross_entropy: float


def _config(arguments: argparse.Namespace, *overrides: str) -> Config:
    return load_config(
        [str(ROOT / "configs" / "smollm2_cpu.yaml")],
        [
            f"data.train={Path(arguments.data).resolve()}",
            f"data.limit={arguments.rows}",
            f"generation.max_new_tokens={arguments.max_new_tokens}",
            f"run_dir={arguments.folder}",
            *overrides,
            *arguments.override,
        ],
    )


# ------------------------------------------------------------------------- the straightforward loop


def straight(arguments: argparse.Namespace) -> dict[str, object]:
    """Returns time, memory and scores of the straightforward loop."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = _config(arguments)
    folder = student_source(config, RunDirectory(Path(config.run_dir))).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    encoder = make_encoder(config, tokenizer)
    examples = read_train(config).examples
    rows = [encoder.encode(example) for example in examples]
    references = [example.references[0] for example in examples]
    cuts = [slice(start, start + STRAIGHT_BATCH) for start in range(0, len(rows), STRAIGHT_BATCH)]
    with torch.no_grad(), PeakMemory() as memory:
        _straight_cross_entropies(model, tokenizer, rows[cuts[0]], config.data.max_tokens)
        model.generate(torch.tensor([rows[0].prompt_ids]), max_new_tokens=2, do_sample=False)
        started = time.monotonic()
        scores = []
        for cut in cuts:
            answers = _straight_answers(model, tokenizer, rows[cut], config)
            losses = _straight_cross_entropies(model, tokenizer, rows[cut], config.data.max_tokens)
            for answer, loss, reference in zip(answers, losses, references[cut], strict=True):
                scores.append(Score(answer, rouge_l(answer, [reference]), loss))
        seconds = time.monotonic() - started
    return {
        "seconds": seconds,
        "memory_bytes": memory.bytes,
        "scores": {row.example_id: asdict(score) for row, score in zip(rows, scores, strict=True)},
    }


def _straight_answers(model, tokenizer, rows, config: Config) -> list[str]:  # type: ignore[no-untyped-def]
    length = config.data.max_prompt_tokens
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, length - row.num_prompt_tokens :] = torch.tensor(row.prompt_ids)
        mask[index, length - row.num_prompt_tokens :] = 1
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=config.generation.max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
    )
    texts = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def _straight_cross_entropies(model, tokenizer, rows, length: int) -> list[float]:  # type: ignore[no-untyped-def]
    ids = torch.zeros((len(rows), length), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for index, row in enumerate(rows):
        ids[index, : len(row.token_ids)] = torch.tensor(row.token_ids)
        mask[index, : len(row.token_ids)] = 1
        labels[index, row.num_prompt_tokens : len(row.token_ids)] = ids[
            index, row.num_prompt_tokens : len(row.token_ids)
        ]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels[:, 1:], reduction="none"
    )
    return (losses.sum(1) / (labels[:, 1:] != -100).sum(1)).tolist()


# --------------------------------------------------------------------------------------------- ours


class TimedWorker(ModelWorker):
    """A worker that notes when it worked and how much memory it took."""

    notes = Path()  # set before the pass starts

    def start(self) -> str:
        """Loads, and answers one short batch as a warm-up."""
        device = super().start()
        self._rss_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return device

    def measure(self, shard: WorkShard) -> ShardResult[DifficultyRecord]:
        """Measures the shard and adds a line to the notes."""
        started = time.monotonic()  # of one clock in all processes
        result = super().measure(shard)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self._rss_before
        note = {"pid": os.getpid(), "started": started, "ended": time.monotonic(), "bytes": peak}
        with self.notes.open("a") as handle:
            handle.write(json.dumps(note) + "\n")
        return result


def ours(arguments: argparse.Namespace) -> dict[str, object]:
    """Returns times, memory and scores of `measure`."""
    import ray

    from pocl_dist.pipeline import actor_pass
    from pocl_dist.pipeline.difficulty_files import read_records
    from pocl_dist.pipeline.measure import measure

    config = _config(arguments)
    run = RunDirectory(Path(config.run_dir))
    shutil.rmtree(run.difficulty, ignore_errors=True)
    ray.cloudpickle.register_pickle_by_value(sys.modules[TimedWorker.__module__])
    TimedWorker.notes = run.root / "notes.jsonl"
    TimedWorker.notes.unlink(missing_ok=True)
    actor_pass.ModelWorker = TimedWorker  # type: ignore[misc]
    started = time.monotonic()
    measure(config, run)
    seconds = time.monotonic() - started
    notes = read_json_lines(TimedWorker.notes)
    peaks = {note["pid"]: 0 for note in notes}
    for note in notes:
        peaks[note["pid"]] = max(peaks[note["pid"]], int(str(note["bytes"])))
    return {
        "seconds": seconds,
        "seconds_without_start": max(float(str(note["ended"])) for note in notes)
        - min(float(str(note["started"])) for note in notes),
        "memory_bytes": sum(peaks.values()),
        "num_actors": len(peaks),
        "batch_size": config.generation.batch_size,
        "scores": {
            r.example_id: asdict(Score(r.answer, r.rouge_l, r.cross_entropy))
            for r in read_records(run.difficulty)
        },
    }


# ------------------------------------------------------------------------------------------ compare


def _agreement(ours: dict, straight: dict) -> dict[str, object]:
    """Returns how far the scores differ."""
    if set(ours) != set(straight):
        raise SystemExit("the sides did not score the same rows")
    pairs = [(ours[name], straight[name]) for name in ours]
    return {
        "num_rows": len(pairs),
        "num_answers_that_differ": sum(a["answer"] != b["answer"] for a, b in pairs),
        "num_rouge_l_that_differ": sum(a["rouge_l"] != b["rouge_l"] for a, b in pairs),
        "max_relative_cross_entropy_difference": max(
            abs(a["cross_entropy"] / b["cross_entropy"] - 1) for a, b in pairs
        ),
    }


def main() -> None:
    """Runs both sides, each in a process of its own, and prints one JSON object at the end."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default=str(ROOT.parent / "shared/data/instruct_train.jsonl"))
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--max-new-tokens", type=int, default=48, help="as smollm2_cpu.yaml has it")
    parser.add_argument("--json", action="store_true", help="the last line is JSON in any case")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=("ours", "straight"), help=argparse.SUPPRESS)
    parser.add_argument("--override", action="append", default=[], help="a config key of our side")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps({"ours": ours, "straight": straight}[arguments.side](arguments)))
        return
    if not Path(arguments.data).is_file():
        raise SystemExit(f"--data: {arguments.data} is not there")
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = folder
        from pocl_dist.pipeline.init_student import init_student

        config = _config(arguments)
        init_student(config, RunDirectory(Path(config.run_dir)))
        passed = [
            f"--{name.replace('_', '-')}={getattr(arguments, name)}"
            for name in ("data", "rows", "max_new_tokens", "folder")
        ] + [f"--override={text}" for text in arguments.override]
        sides = {
            name: run_side(__file__, [*passed, f"--side={name}"]) for name in ("ours", "straight")
        }
    for name, side in sides.items():
        if "error" in side:
            raise SystemExit(f"{name}: {side['error']}")
    agreement = _agreement(*(side.pop("scores") for side in sides.values()))  # type: ignore[arg-type]
    result = {
        "benchmark": "measure",
        "rows": arguments.rows,
        "max_new_tokens": arguments.max_new_tokens,
        "machine": machine(),
        "sides": sides,
        "agreement": agreement,
    }
    print(json.dumps(result, indent=1))
    loss = agreement["max_relative_cross_entropy_difference"]
    if agreement["num_rouge_l_that_differ"] or not loss <= CROSS_ENTROPY_TOLERANCE:  # type: ignore[operator]
        raise SystemExit(f"the scores do not agree: {agreement}")
    baseline = float(str(sides["straight"]["seconds"]))
    result["ratios"] = {
        "times_faster": baseline / float(str(sides["ours"]["seconds"])),
        "times_faster_without_start": baseline / float(str(sides["ours"]["seconds_without_start"])),
        "memory": float(str(sides["ours"]["memory_bytes"]))
        / float(str(sides["straight"]["memory_bytes"])),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
