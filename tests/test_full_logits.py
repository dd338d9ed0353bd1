"""The loss from a model's own logits: equal to the one from hidden states, and to no less."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig

from pocl_dist.config import load_config
from pocl_dist.data.encoding import collate
from pocl_dist.errors import ConfigError
from pocl_dist.losses import DIVERGENCES, distillation_loss
from pocl_dist.losses.full_logits import full_logits_loss
from pocl_dist.models.generation import mean_cross_entropies
from pocl_dist.records import IGNORE_INDEX, EncodedExample, LMHead
from tests.tiny import write_config

NAMES = ("loss_sum", "kd_loss_sum", "ce_loss_sum", "kl_sum")


def make(num_tokens: int) -> tuple[torch.Tensor, ...]:
    """Returns student hidden states and weight, teacher's, and labels, some of them ignored."""
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = ((num_tokens, 5), (11, 5), (num_tokens, 7), (11, 7))
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    labels_N = torch.randint(9, (num_tokens,), generator=generator)
    labels_N[::4] = IGNORE_INDEX
    return *tensors, labels_N


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("num_tokens", [0, 10])
def test_value_and_gradient_are_those_of_the_loss_from_hidden_states(
    name: str, num_tokens: int
) -> None:
    hidden_NH, weight_VH, teacher_NH, teacher_VH, labels_N = make(num_tokens)
    inputs = [hidden_NH.requires_grad_(), weight_VH.requires_grad_()]
    heads = [LMHead(weight, num_real_tokens=9) for weight in (weight_VH, teacher_VH)]
    wanted = distillation_loss(hidden_NH, heads[0], teacher_NH, heads[1], labels_N, name, 1.7, 0.6)
    logits_NV, teacher_NV = hidden_NH @ weight_VH[:9].T, teacher_NH @ teacher_VH[:9].T
    found = full_logits_loss(logits_NV, teacher_NV, labels_N, name, 1.7, 0.6, chunk_size=3)
    for part in NAMES:
        torch.testing.assert_close(getattr(found, part), getattr(wanted, part))
    assert found.num_tokens == wanted.num_tokens
    gradients = [torch.autograd.grad(loss.loss_sum, inputs) for loss in (found, wanted)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_without_a_teacher_it_is_cross_entropy() -> None:
    hidden_NH, weight_VH, *_, labels_N = make(10)
    logits_NV = hidden_NH @ weight_VH.T
    found = full_logits_loss(logits_NV, None, labels_N, "forward_kl", 1.0, 0.0)
    wanted = torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum")
    torch.testing.assert_close(found.loss_sum, wanted)
    assert found.kd_loss_sum == found.kl_sum == 0
    with pytest.raises(ValueError, match="a teacher must be given"):
        full_logits_loss(logits_NV, None, labels_N, "forward_kl", 1.0, 0.5)
    with pytest.raises(ValueError, match="differ"):
        full_logits_loss(logits_NV, logits_NV[:, 1:], labels_N, "forward_kl", 1.0, 0.5)


def test_a_student_without_linear_head_is_measured_by_its_own_logits() -> None:
    torch.manual_seed(0)
    bert = AutoModelForCausalLM.from_config(
        BertConfig(
            vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, is_decoder=True, initializer_range=0.3,
        )
    ).eval()  # fmt: skip
    rows = [
        EncodedExample("a", (5, 6, 7, 8, 9), 2, False, False),
        EncodedExample("b", (5, 6, 7), 1, False, False),
    ]
    wanted = []
    bert.requires_grad_(False)
    for row in rows:
        ids = torch.tensor([row.token_ids])
        logits_TV = bert(input_ids=ids).logits[0, row.num_prompt_tokens - 1 : -1, :55]
        answer = ids[0, row.num_prompt_tokens :]
        wanted.append(float(torch.nn.functional.cross_entropy(logits_TV, answer)))
    assert mean_cross_entropies(bert, collate(rows, 0), 55) == pytest.approx(wanted, rel=1e-5)


def test_full_logits_from_a_cache_of_hidden_states_are_refused(tiny_pair, tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = write_config(tmp_path, *tiny_pair, loss={"full_logits": True})
    assert load_config([path]).loss.full_logits
    with pytest.raises(ConfigError):  # by the choice of sources, until there are more of them
        load_config([path], ["teacher.source=cache_hidden"])
