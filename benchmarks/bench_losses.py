"""The fused loss against full logits, Liger and TRL: time and memory of one forward and backward.

    .venv-bench/bin/python benchmarks/bench_losses.py [--tokens N --vocab V --hidden H] --json

Every side gets the same hidden states, heads and labels, and returns the mean divergence and the
gradients of hidden states and head. Sides run one after another, each in a process of its own: a
check on few tokens (value and gradients must agree, else exit 1), then one warm-up at full size and
`--repeats` timed runs, and at the first shape one with another number of tokens, as every step of a
training has. Memory is the largest peak of a timed run over what was held before it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sides import PeakMemory, machine, run_side

from pocl_dist.losses import distillation_loss, get_divergence
from pocl_dist.records import LMHead

SHAPES = [(1024, 49152, 576, 3), (4096, 49152, 576, 2), (1024, 151936, 1536, 2)]
"""(tokens, vocabulary, hidden size, timed runs of which the quickest counts)."""
CHECK_TOKENS = 48
CHECK_ROWS = 1024  # of the head's gradient; its norm stands for the rest
PEERS = ("full_logits", "liger", "trl")
OURS = ("pocl_dist", "pocl_dist_uncompiled")
UNSUPPORTED = "divergence not supported by this peer"
MAX_VALUE_ERROR, MAX_GRADIENT_ERROR = 1e-4, 1e-3  # relative; all sides compute in fp32


@dataclass(frozen=True)
class Work:
    """What every side is given; student tensors require gradients."""

    student_hidden_NH: torch.Tensor
    student_weight_VH: torch.Tensor
    teacher_hidden_NH: torch.Tensor
    teacher_weight_VH: torch.Tensor
    labels_N: torch.Tensor
    divergence: str
    temperature: float

    def backward(self, side: str) -> float:
        """Runs one side forward and backward into fresh .grad; returns the mean loss."""
        self.student_hidden_NH.grad = self.student_weight_VH.grad = None
        loss = SIDES[side](self)
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())


def make_work(tokens: int, vocab: int, hidden: int, divergence: str, temperature: float) -> Work:
    """Returns random work; logits have a spread of about 3, as trained models have."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    scale = 3 / hidden**0.5
    weights = [randn(vocab, hidden).mul_(scale) for _ in range(2)]
    return Work(
        randn(tokens, hidden).requires_grad_(),
        weights[0].requires_grad_(),
        randn(tokens, hidden),
        weights[1],
        torch.randint(vocab, (tokens,), generator=generator),
        divergence,
        temperature,
    )


def ours(work: Work, compile_mode: str) -> torch.Tensor:
    """Returns the mean of the fused loss, kd_ratio 1."""
    result = distillation_loss(
        work.student_hidden_NH,
        LMHead(work.student_weight_VH),
        work.teacher_hidden_NH,
        LMHead(work.teacher_weight_VH),
        work.labels_N,
        work.divergence,
        work.temperature,
        1.0,
        temperature_scaling="none",
        compile_mode=compile_mode,
    )
    return result.loss_sum / result.num_tokens


def full_logits(work: Work) -> torch.Tensor:
    """Returns what one writes first: both models' logits, log_softmax, the formula, autograd."""
    student_NV = work.student_hidden_NH @ work.student_weight_VH.T
    with torch.no_grad():
        teacher_NV = work.teacher_hidden_NH @ work.teacher_weight_VH.T
        teacher_NV = F.log_softmax(teacher_NV / work.temperature, dim=-1)
    student_NV = F.log_softmax(student_NV / work.temperature, dim=-1)
    return get_divergence(work.divergence).of_finite(student_NV, teacher_NV).mean()


def peer_beta(divergence: str) -> float:
    """Returns the weight of the teacher in Liger's and TRL's generalised JSD (0 and 1: the KLs)."""
    betas = {"forward_kl": 0.0, "reverse_kl": 1.0}
    if divergence == "jensen_shannon":
        return 1 - get_divergence(divergence).kwargs["student_weight"]
    if divergence not in betas:
        print(json.dumps({"error": UNSUPPORTED}))
        raise SystemExit(0)
    return betas[divergence]


def liger(work: Work) -> torch.Tensor:
    """Returns the loss of LigerFusedLinearJSDLoss with its defaults: chunks of 1024, compiled."""
    beta = peer_beta(work.divergence)
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=work.temperature
    )
    return loss(
        work.student_hidden_NH,
        work.student_weight_VH,
        work.teacher_hidden_NH,
        work.teacher_weight_VH,
        work.labels_N,
    )


def trl(work: Work) -> torch.Tensor:
    """Returns the mean of TRL's chunked divergence, the loss of its DistillationTrainer."""
    beta = peer_beta(work.divergence)
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence_N, _ = ChunkedDivergenceFunction.apply(
        work.student_hidden_NH,
        work.student_weight_VH,
        None,
        work.teacher_hidden_NH,
        work.teacher_weight_VH,
        None,
        beta,
        work.temperature,
    )
    return divergence_N.mean()


@torch.no_grad()
def products(work: Work) -> torch.Tensor:
    """Runs the four bare products: both logits, both gradients. No loss can do without them."""
    student_NV = work.student_hidden_NH @ work.student_weight_VH.T
    teacher_NV = work.teacher_hidden_NH @ work.teacher_weight_VH.T
    grad_hidden_NH = student_NV @ work.student_weight_VH
    grad_weight_VH = teacher_NV.T @ work.student_hidden_NH
    return grad_hidden_NH[0, 0] + grad_weight_VH[0, 0]


SIDES: dict[str, Callable[[Work], torch.Tensor]] = {
    "pocl_dist": lambda work: ours(work, "auto"),
    "pocl_dist_uncompiled": lambda work: ours(work, "never"),
    "full_logits": full_logits,
    "liger": liger,
    "trl": trl,
    "products": products,
}


def check_side(side: str, work: Work, path: str) -> dict[str, object]:
    """Writes value and gradients on few tokens to `path`; returns the value."""
    value = work.backward(side)
    grad_hidden_NH, grad_weight_VH = work.student_hidden_NH.grad, work.student_weight_VH.grad
    assert grad_hidden_NH is not None and grad_weight_VH is not None
    rows = torch.linspace(0, len(grad_weight_VH) - 1, CHECK_ROWS).long()
    torch.save(
        [torch.tensor(value), grad_hidden_NH, grad_weight_VH[rows], grad_weight_VH.norm()], path
    )
    return {"value": value}


def time_side(side: str, work: Work, repeats: int, has_another_size: bool) -> dict[str, object]:
    """Returns seconds and peak bytes of each run after a warm-up at full size."""
    start = time.perf_counter()
    work.backward(side)
    warm_up_seconds = time.perf_counter() - start
    seconds, peaks = [], []
    for _ in range(repeats):
        work.student_hidden_NH.grad = work.student_weight_VH.grad = None
        gc.collect()
        # Else memory that the allocator kept from the warm-up would hide a part of the peak.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with PeakMemory() as memory:
            start = time.perf_counter()
            value = work.backward(side)
            seconds.append(time.perf_counter() - start)
        peaks.append(memory.bytes)
    result: dict[str, object] = {
        "seconds": min(seconds),
        "peak_bytes": max(peaks),
        "all_seconds": seconds,
        "warm_up_seconds": warm_up_seconds,
        "value": value,
    }
    if has_another_size:
        fewer = make_work(
            len(work.labels_N) - 5, *work.student_weight_VH.shape, work.divergence, work.temperature
        )
        start = time.perf_counter()
        fewer.backward(side)
        # What a training step meets. Compiled peers compile again.
        result["first_seconds_at_another_size"] = time.perf_counter() - start
    return result


def arguments_of(shape: tuple[int, int, int], args: argparse.Namespace) -> list[str]:
    """Returns the arguments by which a child knows the work."""
    named = dict(zip(("--tokens", "--vocab", "--hidden"), shape, strict=True))
    named |= {"--divergence": args.divergence, "--temperature": args.temperature}
    return [str(x) for pair in named.items() for x in pair]


def disagreements(shape: tuple[int, int, int], args: argparse.Namespace) -> dict[str, object]:
    """Returns {side: relative errors against full logits}; a side that is too far off ends it all.

    On few tokens of the same vocabulary and hidden size.
    """
    few = arguments_of((CHECK_TOKENS, shape[1], shape[2]), args)
    errors: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        expected: list[torch.Tensor] | None = None
        for side in ("full_logits", *OURS, *PEERS[1:]):
            path = str(Path(folder) / side)
            done = run_side(__file__, ["--side", side, "--check", path, *few])
            if "error" in done:
                if side in OURS:
                    raise SystemExit(f"{side}: {done['error']}")
                errors[side] = done["error"]
                continue
            got = torch.load(path)
            if expected is None:
                expected = got
            error = [float((x - y).norm() / y.norm()) for x, y in zip(got, expected, strict=True)]
            errors[side] = {"value": error[0], "gradients": max(error[1:])}
            if error[0] > MAX_VALUE_ERROR or max(error[1:]) > MAX_GRADIENT_ERROR:
                raise SystemExit(f"{side} does not agree with full logits: {errors[side]}")
    return errors


def compare(
    shape: tuple[int, int, int], repeats: int, args: argparse.Namespace
) -> dict[str, object]:
    """Returns the figures of every side for one shape, and the ratios."""
    result: dict[str, object] = dict(zip(("tokens", "vocab", "hidden"), shape, strict=True))
    result["relative_errors"] = disagreements(shape, args)
    sides = {}
    for side in SIDES:
        arguments = ["--side", side, "--repeats", str(repeats), *arguments_of(shape, args)]
        if shape == SHAPES[0][:3]:
            arguments.append("--another-size")
        sides[side] = run_side(__file__, arguments)
        print(f"{shape} {side}: {json.dumps(sides[side])}", file=sys.stderr, flush=True)
    peers = [sides[name] for name in PEERS if "error" not in sides[name]]
    own = sides["pocl_dist"]

    def ratio(field: str, others: list[dict[str, object]]) -> float | None:
        if "error" in own or not others:
            return None
        return float(own[field]) / min(float(other[field]) for other in others)  # type: ignore[arg-type]

    result["sides"] = sides
    result["ratios"] = {
        "time_vs_fastest_peer": ratio("seconds", peers),
        "time_vs_matmul": ratio("seconds", [sides["products"]]),
        "memory_vs_smallest_peer": ratio("peak_bytes", peers),
    }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--divergence", default="jensen_shannon")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, help="timed runs of each side")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--check", help=argparse.SUPPRESS)
    parser.add_argument("--another-size", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    default = SHAPES[0]
    asked = (args.tokens or default[0], args.vocab or default[1], args.hidden or default[2])
    if args.side:
        work = make_work(*asked, args.divergence, args.temperature)
        done = (
            check_side(args.side, work, args.check)
            if args.check
            else time_side(args.side, work, args.repeats, args.another_size)
        )
        print(json.dumps(done))
        return
    get_divergence(args.divergence)  # an unknown name ends here
    has_shape = args.tokens or args.vocab or args.hidden
    shapes = [(*asked, default[3])] if has_shape else SHAPES
    results = [compare(shape[:3], args.repeats or shape[3], args) for shape in shapes]
    for result in results:
        print(f"{result['tokens']} x {result['vocab']} x {result['hidden']}: {result['ratios']}")
    report = {
        "benchmark": "losses",
        "command": " ".join(["python benchmarks/bench_losses.py", *sys.argv[1:]]),
        "divergence": args.divergence,
        "temperature": args.temperature,
        "machine": machine(),
        "shapes": results,
        "ratios": results[0]["ratios"],
    }
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
