"""The chunked loss against autograd over full logits, and against the published loss functions."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from pocl_dist.config.loss_names import LOSSES
from pocl_dist.losses import DistillationLoss, Divergence, distillation_loss, get_divergence
from pocl_dist.losses.blocks import BLOCK_ELEMENTS
from pocl_dist.records import IGNORE_INDEX, LMHead, TeacherTopK

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
NUM_TOKENS, NUM_REAL = 13, 31
every_divergence = pytest.mark.parametrize("name", sorted(LOSSES))


@dataclass(frozen=True)
class Case:
    """Inputs of one call; the student's hidden states, weight and bias require gradients."""

    student_hidden_NH: torch.Tensor
    student_head: LMHead
    teacher_hidden_NH: torch.Tensor
    teacher_head: LMHead
    labels_N: torch.Tensor

    def loss(
        self, divergence: str | Divergence, temperature: float, kd_ratio: float, **kwargs: int
    ) -> DistillationLoss:
        """Returns the loss under test for these inputs."""
        return distillation_loss(
            self.student_hidden_NH,
            self.student_head,
            self.teacher_hidden_NH,
            self.teacher_head,
            self.labels_N,
            divergence,
            temperature,
            kd_ratio,
            **kwargs,  # type: ignore[arg-type]
        )

    def leaves(self) -> list[torch.Tensor]:
        """Returns what gets a gradient."""
        bias_V = self.student_head.bias_V
        biases = [] if bias_V is None else [bias_V]
        return [self.student_hidden_NH, self.student_head.weight_VH, *biases]


def make_case(dtype: torch.dtype = torch.float64, *, is_plain: bool = False) -> Case:
    """Returns 13 tokens, 4 of them ignored; heads of 31 tokens that differ in all but those 31."""
    generator = torch.Generator().manual_seed(11)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    labels_N = torch.randint(NUM_REAL, (NUM_TOKENS,), generator=generator)
    labels_N[[0, 4, 5, 12]] = IGNORE_INDEX
    student_head = LMHead(randn(NUM_REAL + 2, 5).requires_grad_(), num_real_tokens=NUM_REAL)
    teacher_head = LMHead(randn(NUM_REAL + 7, 8), num_real_tokens=NUM_REAL)
    if not is_plain:
        student_head = replace(
            student_head, bias_V=randn(NUM_REAL + 2).requires_grad_(), logit_scale=1.7, softcap=4.0
        )
        teacher_head = replace(
            teacher_head, bias_V=randn(NUM_REAL + 7), logit_scale=0.6, softcap=6.0
        )
    hidden_NH = randn(NUM_TOKENS, 5).requires_grad_()
    return Case(hidden_NH, student_head, randn(NUM_TOKENS, 8), teacher_head, labels_N)


def full_logits(hidden_NH: torch.Tensor, head: LMHead) -> torch.Tensor:
    """Returns the head's logits with -inf in the padding columns."""
    logits_NV = head.logit_scale * F.linear(hidden_NH, head.weight_VH, head.bias_V)
    if head.softcap is not None:
        logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
    is_padding_V = torch.arange(logits_NV.shape[1]) >= (head.num_real_tokens or 10**9)
    return logits_NV.masked_fill(is_padding_V, -torch.inf)


def reference(
    case: Case, divergence: Divergence, temperature: float, kd_ratio: float, scale: float
) -> DistillationLoss:
    """Returns the same sums from full logits by plain autograd; padding cut off by hand."""
    student_NV = full_logits(case.student_hidden_NH, case.student_head)
    teacher_NV = full_logits(case.teacher_hidden_NH, case.teacher_head)
    is_valid_N = case.labels_N != -100
    student_NV, teacher_NV = student_NV[:, :NUM_REAL], teacher_NV[:, :NUM_REAL].detach()
    divergence_N = divergence(
        (student_NV / temperature).log_softmax(-1), (teacher_NV / temperature).log_softmax(-1)
    )
    kd_loss = scale * (divergence_N * is_valid_N).sum()
    ce_loss = F.cross_entropy(student_NV, case.labels_N, ignore_index=-100, reduction="sum")
    kl_N = F.kl_div(
        student_NV.log_softmax(-1), teacher_NV.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    loss = kd_ratio * kd_loss + (1 - kd_ratio) * ce_loss
    return DistillationLoss(loss, kd_loss, ce_loss, kl_N[is_valid_N].sum(), int(is_valid_N.sum()))


def assert_same(got: DistillationLoss, expected: DistillationLoss) -> None:
    """Asserts that all sums are close and the counts equal."""
    torch.testing.assert_close(got.loss_sum, expected.loss_sum)
    torch.testing.assert_close(got.kd_loss_sum, expected.kd_loss_sum.detach())
    torch.testing.assert_close(got.ce_loss_sum, expected.ce_loss_sum.detach())
    torch.testing.assert_close(got.kl_sum, expected.kl_sum.detach())
    assert got.num_tokens == expected.num_tokens


@every_divergence
@pytest.mark.parametrize("is_plain", [True, False])
@pytest.mark.parametrize(("temperature", "kd_ratio"), [(1.0, 0.7), (1.7, 0.9), (2, 1), (2, 0)])
def test_loss_and_gradients_equal_autograd_over_full_logits(
    name: str, is_plain: bool, temperature: float, kd_ratio: float
) -> None:
    case, divergence = make_case(is_plain=is_plain), get_divergence(name)
    scale = temperature ** LOSSES[name].temperature_order
    got = case.loss(name, temperature, kd_ratio, chunk_size=4)
    expected = reference(case, divergence, temperature, kd_ratio, scale)
    assert_same(got, expected)
    got_grads = torch.autograd.grad(got.loss_sum, case.leaves())
    expected_grads = torch.autograd.grad(expected.loss_sum, case.leaves())
    for got_grad, expected_grad in zip(got_grads, expected_grads, strict=True):
        torch.testing.assert_close(got_grad, expected_grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 8, 9, 10, 13, 1000, None])
def test_chunk_size_changes_nothing(dtype: torch.dtype, chunk_size: int | None) -> None:
    case = make_case(dtype)
    whole = case.loss("jensen_shannon", 1.5, 0.8, chunk_size=NUM_TOKENS)
    chunked = case.loss("jensen_shannon", 1.5, 0.8, chunk_size=chunk_size)  # type: ignore[arg-type]
    assert_same(chunked, whole)
    whole_grads = torch.autograd.grad(whole.loss_sum, case.leaves())
    for got, expected in zip(
        torch.autograd.grad(chunked.loss_sum, case.leaves()), whole_grads, strict=True
    ):
        torch.testing.assert_close(got, expected)


# Not for adaptive KL: its weights get no gradient by definition, so finite differences see more.
@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"adaptive_kl"}))
def test_gradcheck_holds_for_hidden_weight_and_bias(name: str) -> None:
    case = make_case()

    def loss_sum(
        hidden_NH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor
    ) -> torch.Tensor:
        head = replace(case.student_head, weight_VH=weight_VH, bias_V=bias_V)
        changed = replace(case, student_hidden_NH=hidden_NH, student_head=head)
        return changed.loss(name, 1.6, 0.8, chunk_size=5).loss_sum

    # Fast mode: one random direction per input, 1 s instead of 30 s.
    assert torch.autograd.gradcheck(loss_sum, case.leaves(), fast_mode=True)


def test_gradients_scale_with_the_incoming_gradient_and_backward_may_run_twice() -> None:
    case = make_case()
    loss_sum = case.loss("reverse_kl", 2.0, 0.7).loss_sum
    once = torch.autograd.grad(loss_sum, case.leaves(), retain_graph=True)
    scaled = torch.autograd.grad(-3.5 * loss_sum, case.leaves())
    for left, right in zip(once, scaled, strict=True):
        torch.testing.assert_close(-3.5 * left, right)


def test_backward_does_not_touch_the_weights() -> None:
    case = make_case()
    expected = torch.autograd.grad(case.loss("reverse_kl", 2.0, 0.7).loss_sum, case.leaves())
    loss_sum = case.loss("reverse_kl", 2.0, 0.7).loss_sum
    for head in (case.student_head, case.teacher_head):  # what ZeRO-3 does between the two passes
        head.weight_VH.data = torch.empty(0, dtype=torch.float64)
    for got_grad, expected_grad in zip(
        torch.autograd.grad(loss_sum, case.leaves()), expected, strict=True
    ):
        torch.testing.assert_close(got_grad, expected_grad)


def test_ignored_rows_change_nothing_and_get_no_gradient() -> None:
    case = make_case()
    is_valid_N = case.labels_N != IGNORE_INDEX
    noise_NH = 1e3 * (~is_valid_N).unsqueeze(1)
    noisy = replace(
        case,
        student_hidden_NH=(case.student_hidden_NH + noise_NH).detach().requires_grad_(),
        teacher_hidden_NH=case.teacher_hidden_NH - noise_NH,
    )
    only_valid = replace(
        case,
        student_hidden_NH=case.student_hidden_NH[is_valid_N],
        teacher_hidden_NH=case.teacher_hidden_NH[is_valid_N],
        labels_N=case.labels_N[is_valid_N],
    )
    got = noisy.loss("forward_kl", 2.0, 0.7)
    assert_same(got, only_valid.loss("forward_kl", 2.0, 0.7))
    (grad_NH,) = torch.autograd.grad(got.loss_sum, noisy.student_hidden_NH)
    assert (grad_NH[~is_valid_N] == 0).all()
    assert (grad_NH[is_valid_N] != 0).all()


@pytest.mark.parametrize("num_rows", [0, 3])
def test_without_a_label_the_loss_is_zero_and_still_gives_gradients(num_rows: int) -> None:
    case = make_case(torch.float32)
    hidden_NH = torch.randn(num_rows, 5, requires_grad=True)
    empty = replace(
        case,
        student_hidden_NH=hidden_NH,
        teacher_hidden_NH=torch.randn(num_rows, 8),
        labels_N=torch.full((num_rows,), IGNORE_INDEX),
    )
    got = empty.loss("skew_forward_kl", 2.0, 0.7)
    (2 * got.loss_sum).backward()
    assert (got.loss_sum.item(), got.num_tokens) == (0.0, 0)
    for leaf in empty.leaves():
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
        assert (leaf.grad == 0).all()


def test_plain_sft_needs_no_teacher_and_is_cross_entropy() -> None:
    case = make_case()
    args = (case.student_hidden_NH, case.student_head, None, None, case.labels_N, "forward_kl")
    got = distillation_loss(*args, 1.0, 0.0)
    with_teacher = case.loss("forward_kl", 1.0, 0.0)
    torch.testing.assert_close(got.loss_sum, with_teacher.ce_loss_sum)
    assert (got.kd_loss_sum.item(), got.kl_sum.item()) == (0.0, 0.0)
    got_grads = torch.autograd.grad(got.loss_sum, case.leaves())
    expected_grads = torch.autograd.grad(with_teacher.loss_sum, case.leaves())
    for got_grad, expected_grad in zip(got_grads, expected_grads, strict=True):
        torch.testing.assert_close(got_grad, expected_grad)
    with pytest.raises(ValueError, match="kd_ratio"):
        distillation_loss(*args, 1.0, 0.5)


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation returned, and the products it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0
        self.new_elements = 0  # of a result in memory of its own
        self.num_products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, torch.Tensor):
                self.num_elements = max(self.num_elements, item.numel())
                tensors = [x for x in args if isinstance(x, torch.Tensor)]
                if item.data_ptr() not in [x.data_ptr() for x in tensors]:
                    self.new_elements = max(self.new_elements, item.numel())
        self.num_products += str(func).startswith(("aten.mm", "aten.addmm"))
        return result


def test_no_tensor_of_all_logits_is_ever_made() -> None:
    vocabulary_size, num_tokens, chunk_size = 101, 40, 7
    hidden_NH = torch.randn(num_tokens, 3, requires_grad=True)
    head = LMHead(torch.randn(vocabulary_size, 3, requires_grad=True))
    labels_N = torch.randint(vocabulary_size, (num_tokens,))
    with LargestTensor() as largest:
        loss = distillation_loss(
            hidden_NH, head, hidden_NH, head, labels_N, "symmetric_kl", 2, 0.7,
            chunk_size=chunk_size,
        )  # fmt: skip
        loss.loss_sum.backward()
    assert largest.num_elements == chunk_size * vocabulary_size


def test_evaluation_skips_the_gradient_products() -> None:
    case = make_case(torch.float32)
    with torch.no_grad(), LargestTensor() as evaluated:
        without_grad = case.loss("forward_kl", 1.3, 0.7, chunk_size=3)
    with LargestTensor() as trained:
        with_grad = case.loss("forward_kl", 1.3, 0.7, chunk_size=3)
    assert not without_grad.loss_sum.requires_grad
    assert (evaluated.num_products, trained.num_products) == (6, 12)
    assert_same(without_grad, with_grad)


def test_frozen_head_gets_no_gradient_and_hidden_still_does() -> None:
    case = make_case()
    head = replace(case.student_head, weight_VH=case.student_head.weight_VH.detach(), bias_V=None)
    frozen = replace(case, student_head=head)
    frozen.loss("forward_kl", 1.0, 1.0).loss_sum.backward()
    assert case.student_hidden_NH.grad is not None
    assert head.weight_VH.grad is None


def test_only_the_loss_sum_carries_a_gradient() -> None:
    got = make_case().loss("forward_kl", 2.0, 0.7)
    assert got.loss_sum.requires_grad
    assert not any(x.requires_grad for x in (got.kd_loss_sum, got.ce_loss_sum, got.kl_sum))


@pytest.mark.parametrize("has_autocast", [False, True])
def test_bf16_hidden_states_give_an_fp32_loss_and_bf16_gradients(has_autocast: bool) -> None:
    case, exact = make_case(torch.bfloat16), make_case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=has_autocast):
        got = case.loss("jensen_shannon", 2.0, 0.7, chunk_size=4)
    expected = exact.loss("jensen_shannon", 2.0, 0.7)
    assert got.loss_sum.dtype == torch.float32
    assert got.loss_sum.item() == pytest.approx(expected.loss_sum.item(), rel=0.02)
    got_grads = torch.autograd.grad(got.loss_sum, case.leaves())
    expected_grads = torch.autograd.grad(expected.loss_sum, exact.leaves())
    for grad, close in zip(got_grads, expected_grads, strict=True):
        assert grad.dtype == torch.bfloat16
        assert (grad.float() - close).norm() < 0.03 * close.norm()


def test_hidden_and_weight_may_differ_in_dtype() -> None:
    case = make_case(torch.float32, is_plain=True)
    hidden_NH = case.student_hidden_NH.detach().bfloat16().requires_grad_()
    mixed = replace(case, student_hidden_NH=hidden_NH)
    grads = torch.autograd.grad(mixed.loss("forward_kl", 1.0, 0.7).loss_sum, mixed.leaves())
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    ("scaling", "factor"), [("auto", 3), ("squared", 9), ("linear", 3), ("none", 1)]
)
def test_temperature_scaling_reaches_the_loss(scaling: str, factor: float) -> None:
    case, divergence = make_case(), get_divergence("total_variation")
    got = case.loss(divergence, 3.0, 0.7, temperature_scaling=scaling)  # type: ignore[arg-type]
    assert_same(got, reference(case, divergence, 3.0, 0.7, factor))


def test_wrong_arguments_are_refused() -> None:
    case = make_case()
    for call, message in [
        (lambda: case.loss("forward_lk", 1.0, 0.5), r"loss\.name"),
        (lambda: case.loss("forward_kl", 0.0, 0.5), r"curriculum\.temperature"),
        (lambda: case.loss("forward_kl", float("nan"), 0.5), r"curriculum\.temperature"),
        (lambda: case.loss("forward_kl", 1.0, 1.5), r"curriculum\.kd_ratio"),
        (lambda: case.loss("forward_kl", 1.0, 0.5, chunk_size=0), "chunk_size"),
        (
            lambda: case.loss("forward_kl", 1.0, 0.5, temperature_scaling="square"),  # type: ignore[arg-type]
            r"loss\.temperature_scaling.*did you mean 'squared'",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_inputs_that_do_not_fit_are_refused() -> None:
    case = make_case()
    teacher_head, student_head = case.teacher_head, case.student_head
    wrong_label_N = case.labels_N.clone()
    wrong_label_N[1] = NUM_REAL
    for changed, message in [
        (replace(case, labels_N=wrong_label_N), r"labels_N: 31 must be -100 or in \[0, 31\)"),
        (replace(case, labels_N=case.labels_N[:5]), "student hidden states"),
        (replace(case, teacher_hidden_NH=case.teacher_hidden_NH[:5]), "teacher hidden states"),
        (replace(case, teacher_head=replace(teacher_head, num_real_tokens=30)), "30 real tokens"),
        (replace(case, teacher_head=replace(teacher_head, num_real_tokens=None)), "38 real"),
        (replace(case, student_head=replace(student_head, num_real_tokens=34)), r"\[1, 33\]"),
        (replace(case, student_head=replace(student_head, softcap=0.0)), "softcap"),
    ]:
        with pytest.raises(ValueError, match=message):
            changed.loss("forward_kl", 1.0, 0.5)


@every_divergence
def test_a_divergence_without_analytic_gradient_is_differentiated_by_autograd(name: str) -> None:
    case, divergence = make_case(), get_divergence(name)
    by_autograd = replace(divergence, gradient=None)
    losses = [case.loss(d, 1.7, 0.8, chunk_size=4) for d in (divergence, by_autograd)]
    assert_same(*losses)
    grads = [torch.autograd.grad(x.loss_sum, case.leaves()) for x in losses]
    for left, right in zip(*grads, strict=True):
        torch.testing.assert_close(left, right)


def test_many_blocks_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    whole = case.loss("jensen_shannon", 1.5, 0.8)
    whole_grads = torch.autograd.grad(whole.loss_sum, case.leaves())
    monkeypatch.setitem(BLOCK_ELEMENTS, "eager", 2 * NUM_REAL)
    blocks = case.loss("jensen_shannon", 1.5, 0.8)
    assert_same(blocks, whole)
    for got, expected in zip(
        torch.autograd.grad(blocks.loss_sum, case.leaves()), whole_grads, strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_the_only_backward_gives_away_its_gradient_and_makes_no_copy() -> None:
    weight_VH = torch.randn(200, 50, requires_grad=True)
    loss = distillation_loss(
        torch.randn(4, 50), LMHead(weight_VH), torch.randn(4, 50), LMHead(torch.randn(200, 50)),
        torch.arange(4), "forward_kl", 1.0, 1.0,
    )  # fmt: skip
    with LargestTensor() as largest:
        (0.5 * loss.loss_sum).backward()
    assert largest.new_elements < weight_VH.numel()


def top_k_of(logits_NV: torch.Tensor, num_kept: int) -> TeacherTopK:
    """Returns what a cache would keep of these logits."""
    logprobs_NV = logits_NV.log_softmax(-1)
    logprobs_NK, token_ids_NK = logprobs_NV.topk(num_kept)
    return TeacherTopK(token_ids_NK, logprobs_NK, torch.log1p(-logprobs_NK.exp().sum(-1)))


def top_k_loss(case: Case, top_k: TeacherTopK, name: str, temperature: float) -> DistillationLoss:
    """Returns the loss against a top-k teacher."""
    return distillation_loss(
        case.student_hidden_NH, case.student_head, None, None, case.labels_N, name, temperature,
        0.8, teacher_top_k=top_k, chunk_size=4,
    )  # fmt: skip


@every_divergence
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_a_teacher_of_which_all_tokens_were_kept_is_the_teacher(
    name: str, temperature: float
) -> None:
    case = make_case()
    logits_NV = full_logits(case.teacher_hidden_NH, case.teacher_head)[:, :NUM_REAL]
    got = top_k_loss(case, top_k_of(logits_NV, NUM_REAL), name, temperature)
    expected = case.loss(name, temperature, 0.8)
    assert_same(got, expected)
    grads = [torch.autograd.grad(x.loss_sum, case.leaves()) for x in (got, expected)]
    for left, right in zip(*grads, strict=True):
        torch.testing.assert_close(left, right)


def test_the_tail_of_a_top_k_teacher_is_spread_evenly_over_the_other_real_tokens() -> None:
    case = make_case()
    logits_NV = full_logits(case.teacher_hidden_NH, case.teacher_head)[:, :NUM_REAL]
    top_k = top_k_of(logits_NV, 5)
    probs_NV = logits_NV.softmax(-1)
    kept_NV = torch.zeros_like(probs_NV).scatter(1, top_k.token_ids_NK, 1).bool()
    tail_N1 = (1 - (probs_NV * kept_NV).sum(-1, keepdim=True)) / (NUM_REAL - 5)
    dense_head = LMHead(torch.eye(NUM_REAL, dtype=torch.float64))
    dense = replace(
        case,
        student_head=replace(case.student_head, num_real_tokens=NUM_REAL),
        teacher_hidden_NH=torch.where(kept_NV, probs_NV, tail_N1).log(),
        teacher_head=dense_head,
    )
    assert_same(
        top_k_loss(case, top_k, "jensen_shannon", 1.7), dense.loss("jensen_shannon", 1.7, 0.8)
    )


@every_divergence
def test_a_top_k_teacher_without_tail_gives_finite_numbers(name: str) -> None:
    case = make_case(torch.float32)
    token_ids_NK = torch.arange(2).expand(NUM_TOKENS, 2)
    logprobs_NK = torch.tensor([0.0, -torch.inf]).expand(NUM_TOKENS, 2)
    top_k = TeacherTopK(token_ids_NK, logprobs_NK, torch.full((NUM_TOKENS,), -torch.inf))
    loss_sum = top_k_loss(case, top_k, name, 2.0).loss_sum
    for value in (loss_sum, *torch.autograd.grad(loss_sum, case.leaves())):
        assert value.isfinite().all()


def test_a_top_k_teacher_that_does_not_fit_is_refused() -> None:
    case = make_case()
    top_k = top_k_of(torch.randn(NUM_TOKENS, NUM_REAL, dtype=torch.float64), 3)
    outside = replace(top_k, token_ids_NK=top_k.token_ids_NK + NUM_REAL)
    fewer = replace(top_k, token_ids_NK=top_k.token_ids_NK[:4])
    too_many = top_k_of(torch.randn(NUM_TOKENS, NUM_REAL + 1, dtype=torch.float64), NUM_REAL + 1)
    for changed, message in [
        (outside, r"must be in \[0, 31\)"),
        (fewer, r"\(4, 3\) must be \(N, K\)"),
        (too_many, r"K 32 must be in \[1, 31\]"),
    ]:
        with pytest.raises(ValueError, match=f"teacher_top_k: .*{message}"):
            top_k_loss(case, changed, "forward_kl", 1.0)
    with pytest.raises(ValueError, match="takes the place"):
        distillation_loss(
            case.student_hidden_NH, case.student_head, case.teacher_hidden_NH, case.teacher_head,
            case.labels_N, "forward_kl", 1.0, 1.0, teacher_top_k=top_k,
        )  # fmt: skip


def golden_cases() -> list[dict[str, object]]:
    """Returns the published cases, or none where the reference files are not on this machine."""
    path = GOLDEN / "losses.json"
    return json.loads(path.read_text())["cases"] if path.exists() else []


GOLDEN_NAMES = {
    "forward_kl": ("forward_kl", None),
    "reverse_kl": ("reverse_kl", None),
    "js_distance": ("jensen_shannon", "student_weight"),
    "tv_distance": ("total_variation", None),
    "skewed_forward_kl": ("skew_forward_kl", "skew"),
    "skewed_reverse_kl": ("skew_reverse_kl", "skew"),
    "symmetric_kl": ("symmetric_kl", "reverse_weight"),
}


def test_published_reference_files_are_there() -> None:
    if not golden_cases():
        pytest.skip(f"NOT CHECKED against the published losses: {GOLDEN}/losses.json is absent")
    assert len(golden_cases()) == 38


@pytest.mark.parametrize(
    "golden", golden_cases(), ids=lambda case: f"{case['loss']} {case['args']}"
)
def test_published_loss_functions_are_reproduced(golden: dict[str, object]) -> None:
    full_name, args = str(golden["loss"]), golden["args"]
    assert isinstance(args, dict)
    name, kwarg = GOLDEN_NAMES[full_name.split(" ")[0].removeprefix("tem_")]
    temperature = args.get("temperature_kld", 1.0)
    divergence = get_divergence(name, **({str(kwarg): args["lam"]} if "lam" in args else {}))
    tensors = load_file(GOLDEN / "losses.safetensors")
    student_NV = tensors["student_logits"].flatten(0, 1).requires_grad_()
    teacher_NV = tensors["teacher_logits"].flatten(0, 1)
    labels_N = tensors["labels"].flatten()
    identity_head = LMHead(torch.eye(student_NV.shape[1]))
    got = distillation_loss(
        student_NV, identity_head, teacher_NV, identity_head, labels_N, divergence, temperature,
        1.0, temperature_scaling="published", chunk_size=4,
    )  # fmt: skip
    value = got.loss_sum / got.num_tokens
    (grad_NV,) = torch.autograd.grad(value, student_NV)
    expected = pytest.approx(golden["value"], rel=1e-5)
    teacher_part = missing_teacher_part(full_name, args, teacher_NV[labels_N != IGNORE_INDEX])
    assert value.item() + teacher_part == expected
    assert grad_NV.norm().item() == pytest.approx(golden["grad_l2"], rel=1e-5)
    assert grad_NV.abs().max().item() == pytest.approx(golden["grad_abs_max"], rel=1e-5)


def missing_teacher_part(full_name: str, args: dict[str, float], teacher_NV: torch.Tensor) -> float:
    """Returns what turns our KL into the published cross-entropy form: the teacher's entropy.

    It takes the factor T^2 where the published name says so, and the weight 1 - lam of the forward
    part in the symmetric KL, which is built on the published forward KL.
    """
    temperature = args.get("temperature_kld", 1.0)
    logprobs_NV = (teacher_NV.double() / temperature).log_softmax(-1)
    entropy = -(logprobs_NV.exp() * logprobs_NV).sum(-1).mean().item()
    if full_name.startswith("symmetric_kl"):
        return (1 - args["lam"]) * entropy
    if "no teacher entropy" not in full_name:
        return 0.0
    return temperature**2 * entropy if "times T^2" in full_name else entropy
