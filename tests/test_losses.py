"""Each divergence against its formula in probability space, and its behaviour at the extremes."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from pocl_dist.config.loss_names import LOSSES, TEMPERATURE_SCALINGS, check_loss, temperature_scale
from pocl_dist.errors import ConfigError
from pocl_dist.losses import DIVERGENCES, get_divergence

Formula = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def kl(p_NV: torch.Tensor, q_NV: torch.Tensor) -> torch.Tensor:
    """Returns KL(p | q) per row from probabilities: the definition, without any care."""
    return (p_NV * (p_NV / q_NV).log()).sum(-1)


def js(s_NV: torch.Tensor, t_NV: torch.Tensor, w: float) -> torch.Tensor:
    """Returns the generalised Jensen-Shannon divergence, student weight w, from probabilities."""
    m_NV = (1 - w) * t_NV + w * s_NV
    return w * kl(s_NV, m_NV) + (1 - w) * kl(t_NV, m_NV)


def akl(s_NV: torch.Tensor, t_NV: torch.Tensor, head_mass: float) -> torch.Tensor:
    """Returns adaptive KL from probabilities, token by token and without a shortcut."""
    rows = []
    for s_V, t_V in zip(s_NV, t_NV, strict=True):
        mass, head = 0.0, []
        for column in t_V.argsort(descending=True).tolist():
            mass += t_V[column].item()
            if head and mass > head_mass:
                break
            head.append(column)
            if mass > head_mass:
                break
        gap_V = (t_V - s_V).abs().detach()
        weight = gap_V[head].sum() / gap_V.sum()
        rows.append(weight * kl(t_V, s_V) + (1 - weight) * kl(s_V, t_V))
    return torch.stack(rows)


def ab(s: torch.Tensor, t: torch.Tensor, a: float, b: float) -> torch.Tensor:
    """Returns the alpha-beta divergence as in ABKD, definition 3.1."""
    inner = t**a * s**b - a / (a + b) * t ** (a + b) - b / (a + b) * s ** (a + b)
    return -inner.sum(-1) / (a * b)


# (name, arguments, formula of the student's and the teacher's probabilities)
ORACLES: list[tuple[str, dict[str, float], Formula]] = [
    ("forward_kl", {}, lambda s, t: kl(t, s)),
    ("reverse_kl", {}, lambda s, t: kl(s, t)),
    ("jensen_shannon", {}, lambda s, t: js(s, t, 0.9)),
    ("jensen_shannon", {"student_weight": 0.5}, lambda s, t: js(s, t, 0.5)),
    ("total_variation", {}, lambda s, t: 0.5 * (t - s).abs().sum(-1)),
    ("skew_forward_kl", {}, lambda s, t: kl(t, 0.1 * t + 0.9 * s)),
    ("skew_forward_kl", {"skew": 0.4}, lambda s, t: kl(t, 0.4 * t + 0.6 * s)),
    ("skew_forward_kl", {"skew": 0}, lambda s, t: kl(t, s)),
    ("skew_reverse_kl", {}, lambda s, t: kl(s, 0.9 * t + 0.1 * s)),
    ("skew_reverse_kl", {"skew": 0.4}, lambda s, t: kl(s, 0.6 * t + 0.4 * s)),
    ("skew_reverse_kl", {"skew": 0}, lambda s, t: kl(s, t)),
    ("symmetric_kl", {}, lambda s, t: 0.9 * kl(s, t) + 0.1 * kl(t, s)),
    ("symmetric_kl", {"reverse_weight": 1}, lambda s, t: kl(s, t)),
    ("symmetric_kl", {"reverse_weight": 0}, lambda s, t: kl(t, s)),
    ("adaptive_kl", {}, lambda s, t: akl(s, t, 0.5)),
    ("adaptive_kl", {"head_mass": 0.9}, lambda s, t: akl(s, t, 0.9)),
    ("adaptive_kl", {"head_mass": 0.01}, lambda s, t: akl(s, t, 0.01)),
    ("alpha_beta", {}, lambda s, t: ab(s, t, 0.2, 0.7)),
    ("alpha_beta", {"alpha": 1, "beta": 1}, lambda s, t: 0.5 * ((s - t) ** 2).sum(-1)),
    ("alpha_beta", {"alpha": 0.5, "beta": 0.5}, lambda s, t: ab(s, t, 0.5, 0.5)),
    ("alpha_beta", {"alpha": 1, "beta": 0}, lambda s, t: kl(t, s)),
    ("alpha_beta", {"alpha": 0, "beta": 1}, lambda s, t: kl(s, t)),
    ("alpha_beta", {"alpha": 0, "beta": 0}, lambda s, t: 0.5 * ((s / t).log() ** 2).sum(-1)),
]
every_divergence = pytest.mark.parametrize("name", sorted(LOSSES))


def random_logits(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Returns logits of 6 tokens over a vocabulary of 23."""
    return 3 * torch.randn(6, 23, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_facts_and_functions_have_the_same_names() -> None:
    assert set(LOSSES) == set(DIVERGENCES)
    assert {name for name, _, _ in ORACLES} == set(LOSSES)


@pytest.mark.parametrize(("name", "kwargs", "formula"), ORACLES)
def test_divergence_and_its_gradient_equal_the_formula_in_probabilities(
    name: str, kwargs: dict[str, float], formula: Formula
) -> None:
    student_NV, teacher_NV = random_logits(0).requires_grad_(), random_logits(1)
    value_N = get_divergence(name, **kwargs)(student_NV.log_softmax(-1), teacher_NV.log_softmax(-1))
    (grad_NV,) = torch.autograd.grad(value_N.sum(), student_NV)
    expected_N = formula(student_NV.softmax(-1), teacher_NV.softmax(-1))
    (expected_grad_NV,) = torch.autograd.grad(expected_N.sum(), student_NV)
    torch.testing.assert_close(value_N, expected_N, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grad_NV, expected_grad_NV, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "kwargs", "formula"), ORACLES)
def test_analytic_gradient_equals_autograd(
    name: str, kwargs: dict[str, float], formula: Formula
) -> None:
    divergence = get_divergence(name, **kwargs)
    logprobs = random_logits(0).log_softmax(-1), random_logits(1).log_softmax(-1)
    assert divergence.gradient is not None
    value_N, grad_NV = divergence.with_gradient(*logprobs)
    expected_N, expected_grad_NV = replace(divergence, gradient=None).with_gradient(*logprobs)
    torch.testing.assert_close(value_N, formula(*(x.exp() for x in logprobs)), rtol=1e-10, atol=0)
    torch.testing.assert_close(value_N, expected_N, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(grad_NV, expected_grad_NV, rtol=1e-10, atol=1e-13)


@every_divergence
@pytest.mark.parametrize("gap", [110.0, 200.0, 1e4, 1e15])
def test_analytic_gradient_is_finite_at_any_logit_gap(name: str, gap: float) -> None:
    signs_NV = torch.sign(random_logits(3, torch.float32))
    student_NV = (gap * signs_NV).log_softmax(-1)
    for teacher_NV in (-gap * signs_NV, gap * signs_NV.roll(1, 1), torch.zeros(6, 23)):
        value_N, grad_NV = get_divergence(name).with_gradient(
            student_NV, teacher_NV.log_softmax(-1)
        )
        assert value_N.isfinite().all()
        assert grad_NV.isfinite().all()


def test_alpha_beta_goes_over_into_its_limits() -> None:
    logprobs = random_logits(0).log_softmax(-1), random_logits(1).log_softmax(-1)
    for alpha, beta, limit in [(1, 1e-7, "forward_kl"), (1e-7, 1, "reverse_kl")]:
        near_N, near_grad_NV = get_divergence("alpha_beta", alpha=alpha, beta=beta).with_gradient(
            *logprobs
        )
        limit_N, limit_grad_NV = get_divergence(limit).with_gradient(*logprobs)
        torch.testing.assert_close(near_N, limit_N, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(near_grad_NV, limit_grad_NV, rtol=1e-5, atol=1e-6)


def test_adaptive_kl_finds_a_head_of_any_length() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = [torch.randn(2, 700, generator=generator, dtype=torch.float64) for _ in range(2)]
    student_NV, teacher_NV = (x.softmax(-1) for x in logits)  # half of the mass: about 100 tokens
    for head_mass in (0.05, 0.5, 0.97):
        got_N = get_divergence("adaptive_kl", head_mass=head_mass)(
            student_NV.log(), teacher_NV.log()
        )
        torch.testing.assert_close(got_N, akl(student_NV, teacher_NV, head_mass))


@every_divergence
def test_divergence_is_zero_with_zero_gradient_where_teacher_equals_student(name: str) -> None:
    logits_NV = random_logits(2, torch.float32).requires_grad_()
    logprobs_NV = logits_NV.log_softmax(-1)
    value_N = get_divergence(name)(logprobs_NV, logprobs_NV.detach())
    (grad_NV,) = torch.autograd.grad(value_N.sum(), logits_NV)
    torch.testing.assert_close(value_N, torch.zeros(6), rtol=0, atol=1e-6)
    torch.testing.assert_close(grad_NV, torch.zeros(6, 23), rtol=0, atol=1e-6)


@every_divergence
def test_divergence_is_never_negative(name: str) -> None:
    for seed in range(20):
        logits_NV = random_logits(seed, torch.float32)
        other_NV = logits_NV + 10.0 ** -(seed % 5) * random_logits(seed + 100, torch.float32)
        value_N = get_divergence(name)(logits_NV.log_softmax(-1), other_NV.log_softmax(-1))
        assert value_N.min() > -1e-6


@every_divergence
@pytest.mark.parametrize("gap", [110.0, 200.0, 1e4, 1e30])
def test_value_and_gradient_are_finite_at_any_logit_gap(name: str, gap: float) -> None:
    signs_NV = torch.sign(random_logits(3, torch.float32))
    student_NV = (gap * signs_NV).requires_grad_()
    for teacher_NV in (-gap * signs_NV, gap * signs_NV.roll(1, 1), torch.zeros(6, 23)):
        value_N = get_divergence(name)(student_NV.log_softmax(-1), teacher_NV.log_softmax(-1))
        (grad_NV,) = torch.autograd.grad(value_N.sum(), student_NV)
        assert value_N.isfinite().all()
        assert grad_NV.isfinite().all()


@every_divergence
def test_columns_impossible_on_both_sides_change_nothing(name: str) -> None:
    student_NV, teacher_NV = random_logits(4).requires_grad_(), random_logits(5)
    padding = torch.full((6, 3), -math.inf, dtype=torch.float64)
    padded = [torch.cat([x, padding], 1).log_softmax(-1) for x in (student_NV, teacher_NV)]
    value_N = get_divergence(name)(student_NV.log_softmax(-1), teacher_NV.log_softmax(-1))
    padded_value_N = get_divergence(name)(*padded)
    (grad_NV,) = torch.autograd.grad(value_N.sum(), student_NV)
    (padded_grad_NV,) = torch.autograd.grad(padded_value_N.sum(), student_NV)
    torch.testing.assert_close(padded_value_N, value_N)
    torch.testing.assert_close(padded_grad_NV, grad_NV)


def test_a_token_impossible_for_the_teacher_only_is_free_under_forward_kl() -> None:
    teacher_NV = torch.tensor([[0.5, 0.5, 0.0]]).log()
    student_NV = torch.tensor([[0.25, 0.25, 0.5]]).log()
    assert get_divergence("forward_kl")(student_NV, teacher_NV).item() == pytest.approx(math.log(2))
    assert get_divergence("reverse_kl")(student_NV, teacher_NV).item() > 1e30


@every_divergence
def test_declared_temperature_order_keeps_the_gradient_size(name: str) -> None:
    student_NV = random_logits(6).requires_grad_()
    teacher_NV = random_logits(7)
    divergence = get_divergence(name)
    norms = []
    for temperature in (100.0, 200.0):  # where the asymptotic order holds
        value_N = divergence(
            (student_NV / temperature).log_softmax(-1), (teacher_NV / temperature).log_softmax(-1)
        )
        (grad_NV,) = torch.autograd.grad(value_N.sum(), student_NV)
        norms.append(grad_NV.norm().item() * temperature**divergence.temperature_order)
    assert norms[1] / norms[0] == pytest.approx(1, abs=0.05)


def test_divergence_carries_its_facts_and_can_be_pickled() -> None:
    divergence = get_divergence("jensen_shannon")
    assert divergence.kwargs == {"student_weight": 0.9}
    assert (divergence.temperature_order, divergence.published_order) == (2, 2)
    assert pickle.loads(pickle.dumps(divergence)) == divergence


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("foward_kl", {}, r"loss\.name: .*'foward_kl'.*did you mean 'forward_kl'.*total_variation"),
        ("jsd", {}, r"loss\.name: .*'jsd'.*jensen_shannon"),
        ("forward_kl", {"skew": 0.1}, r"loss\.kwargs\.skew: .*forward_kl takes no arguments"),
        ("skew_reverse_kl", {"skwe": 0.1}, r"loss\.kwargs\.skwe: .*did you mean 'skew'"),
        ("skew_forward_kl", {"skew": 1.0}, r"loss\.kwargs\.skew: 1.0 .*\[0, 1\)"),
        ("skew_forward_kl", {"skew": -0.1}, r"loss\.kwargs\.skew: -0.1 "),
        ("jensen_shannon", {"student_weight": 0}, r"loss\.kwargs\.student_weight: 0 .*\(0, 1\)"),
        ("jensen_shannon", {"student_weight": 1}, r"loss\.kwargs\.student_weight: 1 "),
        ("symmetric_kl", {"reverse_weight": 1.1}, r"loss\.kwargs\.reverse_weight: 1.1 .*\[0, 1\]"),
        ("symmetric_kl", {"reverse_weight": math.nan}, r"loss\.kwargs\.reverse_weight: nan "),
        ("symmetric_kl", {"reverse_weight": "0.5"}, r"loss\.kwargs\.reverse_weight: '0.5' "),
        ("adaptive_kl", {"head_mass": 1}, r"loss\.kwargs\.head_mass: 1 .*\(0, 1\)"),
        ("alpha_beta", {"alpha": -0.1}, r"loss\.kwargs\.alpha: -0.1 .*\[0, 1\]"),
        ("alpha_beta", {"beta": 1.5}, r"loss\.kwargs\.beta: 1.5 .*\[0, 1\]"),
        ("symmetric_kl", {"reverse_weight": True}, r"loss\.kwargs\.reverse_weight: True "),
    ],
)
def test_what_is_not_allowed_is_refused_with_key_value_and_range(
    name: str, kwargs: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_loss(name, kwargs)
    with pytest.raises(ValueError, match=message):
        get_divergence(name, **kwargs)


def test_names_can_be_checked_without_torch() -> None:
    code = "import sys, pocl_dist.config.loss_names as n; n.check_loss('forward_kl', {}); "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "factors"),  # at T = 3, in the order of TEMPERATURE_SCALINGS
    [
        ("forward_kl", (9, 9, 3, 1, 9)),
        ("reverse_kl", (9, 9, 3, 1, 1)),
        ("jensen_shannon", (9, 9, 3, 1, 9)),
        ("total_variation", (3, 9, 3, 1, 1)),
        ("skew_forward_kl", (9, 9, 3, 1, 1)),
        ("skew_reverse_kl", (9, 9, 3, 1, 9)),
        ("symmetric_kl", (9, 9, 3, 1, 1)),
        ("adaptive_kl", (9, 9, 3, 1, 1)),
        ("alpha_beta", (9, 9, 3, 1, 1)),
    ],
)
def test_temperature_scale_follows_the_table(name: str, factors: tuple[int, ...]) -> None:
    assert TEMPERATURE_SCALINGS == ("auto", "squared", "linear", "none", "published")
    spec = LOSSES[name]
    orders = (spec.temperature_order, spec.published_order)
    for scaling, factor in zip(TEMPERATURE_SCALINGS, factors, strict=True):
        scale = temperature_scale(
            3.0, scaling, temperature_order=orders[0], published_order=orders[1]
        )
        assert scale == factor
