"""The compiled element-wise part against the one that is not, and when it is used."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator

import pytest
import torch

from pocl_dist.errors import ConfigError
from pocl_dist.losses import DistillationLoss, distillation_loss, get_divergence
from pocl_dist.losses.compiled import MIN_LOGITS, MIN_VOCABULARY, BlockCompiler
from pocl_dist.records import LMHead

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="NOT CHECKED: compiled losses need g++"
)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Torch keeps few variants per function and no test may fill that up for the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss_and_gradients(
    compile_mode: str, dtype: torch.dtype, name: str, temperature: float, kd_ratio: float
) -> tuple[DistillationLoss, list[torch.Tensor]]:
    """Returns the loss of 11 tokens over 31 (with all features of a head) and its gradients."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    leaves = [randn(11, 5), randn(33, 5), randn(33)]
    for leaf in leaves:
        leaf.requires_grad_()
    student_head = LMHead(leaves[1], leaves[2], logit_scale=1.7, softcap=4.0, num_real_tokens=31)
    teacher_head = LMHead(randn(38, 8), num_real_tokens=31)
    labels_N = torch.randint(31, (11,), generator=generator)
    got = distillation_loss(
        leaves[0], student_head, randn(11, 8), teacher_head, labels_N, name, temperature, kd_ratio,
        chunk_size=4, compile_mode=compile_mode,
    )  # fmt: skip
    return got, list(torch.autograd.grad(got.loss_sum, leaves))


@needs_compiler
@pytest.mark.parametrize(("temperature", "kd_ratio"), [(1.0, 0.7), (1.7, 1.0)])
def test_compiled_value_and_gradients_equal_float64(
    fresh_dynamo: None, temperature: float, kd_ratio: float
) -> None:
    got, got_grads = loss_and_gradients(
        "always", torch.float32, "jensen_shannon", temperature, kd_ratio
    )
    expected, expected_grads = loss_and_gradients(
        "never", torch.float64, "jensen_shannon", temperature, kd_ratio
    )
    for field in ("loss_sum", "kd_loss_sum", "ce_loss_sum", "kl_sum"):
        value, exact = getattr(got, field).item(), getattr(expected, field).item()
        assert value == pytest.approx(exact, rel=1e-5)
    for grad, exact_grad in zip(got_grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=1e-5)


def test_auto_compiles_large_vocabularies_only_and_always_the_same_way() -> None:
    compiler, divergence = BlockCompiler(), get_divergence("jensen_shannon")
    large = {"num_tokens": MIN_LOGITS // MIN_VOCABULARY, "vocabulary_size": MIN_VOCABULARY}
    has_compiler = shutil.which("g++") is not None
    assert compiler.is_used("auto", divergence, CPU, **large) == has_compiler
    assert compiler.is_used("auto", divergence, CPU, **large) == has_compiler
    for small in (
        {"num_tokens": 10**6, "vocabulary_size": MIN_VOCABULARY - 1},
        {"num_tokens": MIN_LOGITS // MIN_VOCABULARY - 1, "vocabulary_size": MIN_VOCABULARY},
        {"num_tokens": 1, "vocabulary_size": 10 * MIN_LOGITS},
        {"num_tokens": 0, "vocabulary_size": MIN_VOCABULARY},
    ):
        assert not compiler.is_used("auto", divergence, CPU, **small)
    assert not compiler.is_used("never", divergence, CPU, **large)
    assert not compiler.is_used("auto", get_divergence("adaptive_kl"), CPU, **large)


def test_what_cannot_be_compiled_is_refused_under_always(monkeypatch: pytest.MonkeyPatch) -> None:
    size = {"num_tokens": 9, "vocabulary_size": 9}
    for mode, name, message in [
        ("sometimes", "forward_kl", "'sometimes' must be one of auto, always, never"),
        ("always", "adaptive_kl", "adaptive_kl is no formula"),
    ]:
        with pytest.raises(ConfigError, match=rf"loss\.compile: .*{message}"):
            BlockCompiler().is_used(mode, get_divergence(name), CPU, **size)
    monkeypatch.setenv("CXX", "no-such-compiler")
    divergence = get_divergence("forward_kl")
    with pytest.raises(ConfigError, match=r"loss\.compile: .*no-such-compiler is not installed"):
        BlockCompiler().is_used("always", divergence, CPU, **size)
    large = {"num_tokens": MIN_LOGITS, "vocabulary_size": MIN_VOCABULARY}
    assert not BlockCompiler().is_used("auto", divergence, CPU, **large)


def test_a_compiler_that_fails_is_reported_once_and_the_result_stays(
    fresh_dynamo: None, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    from pocl_dist.losses.blocks import BLOCK_COMPILER

    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    # Torch looks for a compiler once per process, so another CXX would come too late here.
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: str(broken))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(BLOCK_COMPILER, "functions", {})
    monkeypatch.setattr(BLOCK_COMPILER, "has_failed", False)
    monkeypatch.setattr("pocl_dist.losses.compiled.MIN_VOCABULARY", 2)
    monkeypatch.setattr("pocl_dist.losses.compiled.MIN_LOGITS", 2)
    expected, _ = loss_and_gradients("never", torch.float32, "forward_kl", 1.0, 0.7)
    with pytest.warns(UserWarning, match=r"loss\.compile: compiling .* failed"):
        got, _ = loss_and_gradients("auto", torch.float32, "forward_kl", 1.0, 0.7)
    assert got.loss_sum.item() == expected.loss_sum.item()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_and_gradients("auto", torch.float32, "forward_kl", 1.0, 0.7)
