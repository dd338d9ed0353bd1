"""Two training steps of ours, and the same steps as a plain torch loop over full logits."""

from __future__ import annotations

import json
import os
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from pocl_dist.config import Config, load_config
from pocl_dist.models.sources import cache_folder
from pocl_dist.pipeline.plan import make_plan
from pocl_dist.pipeline.plan_files import read_plan
from pocl_dist.pipeline.run_directory import RunDirectory
from tests.ranks import run_ranks


@dataclass
class Steps:
    """Per step: the loss, and the whole gradient of each parameter before clipping."""

    losses: list[float]
    gradients: list[dict[str, torch.Tensor]]


def _train_steps(path: str, num_steps: int) -> Steps:
    from deepspeed.utils import safe_get_full_grad

    from pocl_dist.distributed.process_group import join_process_group
    from pocl_dist.pipeline import distill, train_step
    from pocl_dist.pipeline.prepare import prepare_training
    from pocl_dist.pipeline.stop_request import StopRequest

    config = load_config([path])
    run = RunDirectory(Path(config.run_dir))
    seen = Steps([], [])
    update, log_step = train_step.update, distill._log_step

    def look(engine, rank) -> float:  # type: ignore[no-untyped-def]
        seen.gradients.append(
            {
                name.removeprefix("model."): safe_get_full_grad(p).double().clone()
                for name, p in engine.module.named_parameters()
                if p.requires_grad
            }
        )
        return update(engine, rank)

    def note(training, instruction, result, *_) -> None:  # type: ignore[no-untyped-def]
        seen.losses.append(result.loss)

    train_step.update, distill._log_step = look, note
    try:
        training = prepare_training(config, run, join_process_group(60))
        for _ in range(num_steps):
            instruction = training.coordinator.next_instruction(False, False)
            distill._train(training, instruction, StopRequest(run, None))
        training.close()
    finally:
        train_step.update, distill._log_step = update, log_step
    return seen


def _train_all(
    paths: dict[str, str], num_steps: int, cache: str
) -> dict[str, tuple[Steps | None, str]]:
    os.environ["POCL_DIST_CACHE"] = cache
    found: dict[str, tuple[Steps | None, str]] = {}
    for name, path in paths.items():
        try:
            seen = _train_steps(path, num_steps)
            for gradients in seen.gradients:  # plain numbers cross the process border
                for key, value in gradients.items():
                    gradients[key] = value.numpy()  # type: ignore[assignment]
            found[name] = (seen, "")
        except Exception:
            found[name] = (None, traceback.format_exc())
    return found


def train_all(configs: dict[str, Path], num_steps: int) -> dict[str, tuple[Steps | None, str]]:
    """Trains each config some steps, on one rank, in one process: {name: (steps, error)}."""
    for path in configs.values():
        loaded = load_config([path])
        make_plan(loaded, RunDirectory(Path(loaded.run_dir)))
    paths = {name: str(path) for name, path in configs.items()}
    return run_ranks(_train_all, 1, paths, num_steps, str(cache_folder()))[0]


def plain_steps(config: Config, num_steps: int) -> Steps:
    """Returns the first steps of a one-stage run by the models' own logits, in float64.

    Forward KL times T^2, mixing, global mean over tokens, clip 1, AdamW with decay on
    matrices, cosine. Only the plan and the order of the examples are ours.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pocl_dist.data.sampler import StageSampler

    plan = read_plan(RunDirectory(Path(config.run_dir)).plan)
    (stage,) = plan.stages
    assert config.models.teacher is not None and config.models.student.path is not None
    paths = config.models.teacher.path, config.models.student.path
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in paths
    )
    tokenizer = AutoTokenizer.from_pretrained(paths[1])
    lines = Path(config.data.train).read_text().splitlines()
    rows = {row["id"]: row for row in map(json.loads, lines)}
    matrices = [p for p in student.parameters() if p.ndim >= 2]
    others = [p for p in student.parameters() if p.ndim < 2]
    rate = config.optimizer.learning_rate
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}], rate
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, stage.num_steps, eta_min=1e-7)
    sampler = StageSampler(config.seed, 0, stage.num_examples, stage.epochs, 8)
    seen = Steps([], [])
    t = stage.temperature
    for step in range(num_steps):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for position in sampler.batch(step):
            row = rows[plan.ranking[position]]
            text = f"### Instruction:\n{row['instruction']}\n\n### Response:\n"
            prompt = tokenizer(text)["input_ids"]
            answer = [*tokenizer(row["output"])["input_ids"], tokenizer.eos_token_id]
            ids = torch.tensor([prompt + answer])
            at = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
            z = student(ids).logits[0, at, : len(tokenizer)].double()
            with torch.no_grad():
                y = teacher(ids).logits[0, at, : len(tokenizer)].double()
            p, q = torch.log_softmax(y / t, -1), torch.log_softmax(z / t, -1)
            kl = (p.exp() * (p - q)).sum() * t * t
            ce = torch.nn.functional.cross_entropy(z, torch.tensor(answer), reduction="sum")
            total = total + stage.kd_ratio * kl + (1 - stage.kd_ratio) * ce
            count += len(answer)
        optimizer.zero_grad()
        (total / count).backward()
        seen.losses.append(float(total.detach()) / count)
        seen.gradients.append(
            {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
        )
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return seen


def assert_same_steps(found: Steps, wanted: Steps, tolerance: float) -> None:
    """Asserts losses equal, relative, and each gradient, relative to its largest entry."""
    torch.testing.assert_close(
        torch.tensor(found.losses), torch.tensor(wanted.losses), rtol=tolerance, atol=0.0
    )
    for mine, theirs in zip(found.gradients, wanted.gradients, strict=True):
        assert set(mine) == set(theirs)
        floor = 1e-3 * max(float(torch.as_tensor(value).abs().max()) for value in theirs.values())
        for name, value in theirs.items():
            largest = max(float(torch.as_tensor(value).abs().max()), floor)
            difference = float((torch.as_tensor(mine[name]) - torch.as_tensor(value)).abs().max())
            assert difference <= tolerance * largest, (name, difference, largest)
