"""make gpu-check: the fused loss, a train step and ZeRO-3 on this machine's CUDA device.

    python benchmarks/gpu_check.py

Runs with any python that has PyTorch; data and weights are generated, no network is used. What
needs a missing package is skipped, loudly. The last line is one JSON object. Exit status: 0 all
that ran is right, 1 a check failed, 69 there is no CUDA device.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

NO_DEVICE = 69
TOKENS, VOCAB, HIDDEN = 4096, 49152, 2048
BF16_TOLERANCE = 0.02  # relative, of norms: bf16 keeps 8 bits

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> int:
    """Runs every check that this machine has the packages for; returns the exit status."""
    if importlib.util.find_spec("torch") is None:
        print("gpu-check: PyTorch is not installed for", sys.executable)
        return NO_DEVICE
    import torch

    if not torch.cuda.is_available():
        print("gpu-check: no CUDA device here; nothing was checked")
        print(json.dumps({"benchmark": "gpu_check", "error": "no CUDA device"}))
        return NO_DEVICE
    report: dict[str, object] = {
        "benchmark": "gpu_check",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "tokens": TOKENS,
        "vocab": VOCAB,
        "hidden": HIDDEN,
    }
    checks: list[tuple[str, tuple[str, ...], Callable[[], dict[str, object]]]] = [
        ("parity", ("pydantic",), check_parity),
        ("speed", ("pydantic",), check_speed),
        ("train_step", ("pydantic", "transformers"), check_train_step),
        ("zero3", ("pydantic", "transformers", "deepspeed"), check_zero3),
    ]
    has_failed = False
    for name, packages, check in checks:
        missing = [x for x in packages if importlib.util.find_spec(x) is None]
        if missing:
            print(f"gpu-check: SKIPPED {name}: {', '.join(missing)} not installed", flush=True)
            report[name] = {"skipped": missing}
            continue
        try:
            report[name] = check()
        except Exception as error:  # one broken check must not hide the others; it fails the run
            report[name] = {"error": f"{type(error).__name__}: {error}"}
            has_failed = True
        torch.cuda.empty_cache()
        print(f"gpu-check: {name}: {json.dumps(report[name])}", flush=True)
    print(json.dumps(report))
    return int(has_failed)


def _work(tokens: int, dtype: object) -> list:
    """Returns hidden states and head of student (with gradients) and teacher, and labels."""
    import torch

    generator = torch.Generator("cuda").manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    scale = 3 / HIDDEN**0.5
    return [
        randn(tokens, HIDDEN).requires_grad_(),
        (randn(VOCAB, HIDDEN) * scale).requires_grad_(),
        randn(tokens, HIDDEN),
        randn(VOCAB, HIDDEN) * scale,
        torch.randint(VOCAB, (tokens,), generator=generator, device="cuda"),
    ]


def _fused(work: list, compile_mode: str):  # type: ignore[no-untyped-def]
    """Returns the mean loss of pocl_dist: JSD at T = 2 with a tenth of cross-entropy."""
    from pocl_dist.losses import distillation_loss
    from pocl_dist.records import LMHead

    hidden_NH, weight_VH, teacher_hidden_NH, teacher_weight_VH, labels_N = work
    result = distillation_loss(
        hidden_NH,
        LMHead(weight_VH),
        teacher_hidden_NH,
        LMHead(teacher_weight_VH),
        labels_N,
        "jensen_shannon",
        2.0,
        0.9,
        temperature_scaling="none",
        compile_mode=compile_mode,
    )
    return result.loss_sum / result.num_tokens


def _full_logits(work: list):  # type: ignore[no-untyped-def]
    """Returns the same from both models' whole logits, by autograd, in fp32 after the products."""
    import torch.nn.functional as F

    from pocl_dist.losses import get_divergence

    hidden_NH, weight_VH, teacher_hidden_NH, teacher_weight_VH, labels_N = work
    student_NV = (hidden_NH @ weight_VH.T).to(_wide(hidden_NH))
    teacher_NV = (teacher_hidden_NH @ teacher_weight_VH.T).to(_wide(hidden_NH))
    divergence_N = get_divergence("jensen_shannon").of_finite(
        (student_NV / 2).log_softmax(-1), (teacher_NV / 2).log_softmax(-1)
    )
    return 0.9 * divergence_N.mean() + 0.1 * F.cross_entropy(student_NV, labels_N)


def _wide(tensor):  # type: ignore[no-untyped-def]
    import torch

    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def check_parity() -> dict[str, object]:
    """Value and gradients in bf16 and fp32, compiled and not, against float64 full logits."""
    import torch

    result: dict[str, object] = {}
    for dtype, tolerance in ((torch.float32, 2e-4), (torch.bfloat16, BF16_TOLERANCE)):
        exact = [x.detach() for x in _work(256, dtype)]
        exact = [x.double() if x.is_floating_point() else x for x in exact]
        for tensor in exact[:2]:
            tensor.requires_grad_()
        expected = _full_logits(exact)
        expected.backward()
        for mode in ("never", "auto"):
            work = _work(256, dtype)
            loss = _fused(work, mode)
            loss.backward()
            errors = [abs(loss.item() / expected.item() - 1)]
            for got, want in zip(work[:2], exact[:2], strict=True):
                errors.append(float((got.grad.double() - want.grad).norm() / want.grad.norm()))
            result[f"{dtype} {mode}".removeprefix("torch.")] = errors
            if max(errors) > tolerance:
                raise ValueError(f"{dtype}, loss.compile {mode}: relative errors {errors}")
    return result


def _measure(run: Callable[[], None], repeats: int = 5) -> dict[str, object]:
    """Returns the least seconds of a run, and its peak bytes above what was held before."""
    import torch

    run()
    seconds = []
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "peak_bytes": torch.cuda.max_memory_allocated() - held}


def check_speed() -> dict[str, object]:
    """Time and memory in bf16 against full logits, Liger and the four bare products."""
    import torch

    work = _work(TOKENS, torch.bfloat16)

    def backward(loss_of: Callable[[list], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            work[0].grad = work[1].grad = None
            loss_of(work).backward()
            work[0].grad = work[1].grad = None

        return run

    @torch.no_grad()
    def products() -> None:
        student_NV, _ = work[0] @ work[1].T, work[2] @ work[3].T
        _ = student_NV @ work[1], student_NV.T @ work[0]

    sides: dict[str, Callable[[], None]] = {
        "products": products,
        "pocl_dist": backward(lambda work: _fused(work, "auto")),
        "pocl_dist_uncompiled": backward(lambda work: _fused(work, "never")),
        "full_logits": backward(_full_logits),
    }
    if importlib.util.find_spec("liger_kernel") is None:
        print("gpu-check: SKIPPED speed against Liger: liger_kernel not installed", flush=True)
    else:
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

        liger = LigerFusedLinearJSDLoss(0.1, 0.9, beta=0.1, temperature=2.0)
        sides["liger"] = backward(lambda work: liger(*work))
    result: dict[str, object] = {}
    for name, run in sides.items():
        try:
            result[name] = _measure(run)
        except torch.OutOfMemoryError:
            result[name] = {"error": "out of memory"}
        torch.cuda.empty_cache()
    return result


def _student():  # type: ignore[no-untyped-def]
    """Returns a Llama of about 0.4 billion parameters with random weights, in bf16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16)


def _matmul_peak() -> float:
    """Returns the FLOP/s of the best of some large bf16 products."""
    import torch

    best = 0.0
    for size in (4096, 8192):
        left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in "ab")
        seconds = _measure(lambda left=left, right=right: torch.mm(left, right), 10)["seconds"]
        best = max(best, 2 * size**3 / float(seconds))  # type: ignore[arg-type]
    return best


def _step_loss(model, batch):  # type: ignore[no-untyped-def]
    """Returns the fused loss of a student's batch against random teacher states."""
    input_ids_BT, teacher_hidden_NH, teacher_weight_VH = batch
    hidden_BTH = model.model(input_ids=input_ids_BT).last_hidden_state
    labels_N = input_ids_BT.roll(-1, 1).flatten()
    work = [hidden_BTH.flatten(0, 1), model.lm_head.weight]
    return _fused([*work, teacher_hidden_NH, teacher_weight_VH, labels_N], "auto")


def _batch() -> tuple:
    import torch

    work = _work(TOKENS, torch.bfloat16)
    input_ids_BT = torch.randint(VOCAB, (TOKENS // 512, 512), device="cuda")
    return input_ids_BT, work[2], work[3]


def check_train_step() -> dict[str, object]:
    """One step (forward, backward, AdamW) of a student: its FLOP/s as a share of a product's."""
    import torch

    model, batch = _student(), _batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        _step_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    result = _measure(step)
    num_backbone = sum(p.numel() for p in model.model.layers.parameters())
    # 2 FLOP per parameter and token forward, 4 backward; the head 2 + 4 and the teacher's head 2.
    flop = TOKENS * (6 * num_backbone + 8 * VOCAB * HIDDEN)
    achieved, peak = flop / float(result["seconds"]), _matmul_peak()  # type: ignore[arg-type]
    return {
        **result,
        "flop_per_second": achieved,
        "matmul_flop_per_second": peak,
        "share": achieved / peak,
        "tokens_per_second": TOKENS / float(result["seconds"]),  # type: ignore[arg-type]
    }


def check_zero3() -> dict[str, object]:
    """Two ZeRO-3 steps on one rank, head gathered as an external parameter; losses must fall."""
    from pocl_dist.free_port import free_port

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    import deepspeed
    from torch import nn

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = _student()
            deepspeed.zero.register_external_parameter(self, self.model.lm_head.weight)

        def forward(self, *batch):  # type: ignore[no-untyped-def]
            return _step_loss(self.model, batch)

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
    }
    wrapper = Wrapper()
    engine = deepspeed.initialize(
        model=wrapper, model_parameters=wrapper.parameters(), config=config
    )[0]
    batch, losses = _batch(), []
    for _ in range(3):
        loss = engine(*batch)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    if not losses[-1] < losses[0]:
        raise ValueError(f"the loss does not fall under ZeRO-3: {losses}")
    return {"losses": losses}


if __name__ == "__main__":
    raise SystemExit(main())
