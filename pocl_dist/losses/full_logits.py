"""The distillation loss from logits that a model gave itself: for heads that are no linear map.

N tokens of a micro-batch, V real tokens of the vocabulary. All logits exist at once here; what
`distillation_loss` avoids. Softmaxes are formed again in backward, chunk by chunk, and not kept.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from pocl_dist.config.loss_names import temperature_scale
from pocl_dist.losses.distillation import DistillationLoss
from pocl_dist.losses.forward_kl import forward_kl
from pocl_dist.losses.registry import Divergence, get_divergence
from pocl_dist.records import IGNORE_INDEX

TOKENS_PER_CHUNK = 64


def full_logits_loss(
    student_logits_NV: torch.Tensor,
    teacher_logits_NV: torch.Tensor | None,
    labels_N: torch.Tensor,
    divergence: str | Divergence,
    temperature: float,
    kd_ratio: float,
    *,
    temperature_scaling: str = "auto",
    chunk_size: int | None = None,
) -> DistillationLoss:
    """Returns the sums of `distillation_loss`, from logits; gradients reach those of the student.

    Raises ValueError when the shapes do not agree or a teacher is missing.
    """
    if isinstance(divergence, str):
        divergence = get_divergence(divergence)
    _check(student_logits_NV, teacher_logits_NV, labels_N, kd_ratio)
    scale = temperature_scale(
        temperature,
        temperature_scaling,
        temperature_order=divergence.temperature_order,
        published_order=divergence.published_order,
    )

    is_label_N = labels_N != IGNORE_INDEX
    student_MV, labels_M = student_logits_NV[is_label_N], labels_N[is_label_N]
    teacher_MV = None if teacher_logits_NV is None else teacher_logits_NV.detach()[is_label_N]
    # Part of the graph also when there is no token: an empty micro-batch goes through backward.
    sums = _wide(student_MV[:0]).sum().expand(3)
    size = chunk_size or TOKENS_PER_CHUNK
    for start in range(0, len(labels_M), size):
        rows = slice(start, start + size)
        teacher_CV = None if teacher_MV is None else teacher_MV[rows]
        sums = sums + checkpoint(
            partial(_part_sums, divergence=divergence, temperature=temperature, scale=scale),
            student_MV[rows],
            teacher_CV,
            labels_M[rows],
            use_reentrant=False,
            preserve_rng_state=False,
        )
    kd_sum, ce_sum, kl_sum = sums
    loss_sum = kd_ratio * kd_sum + (1 - kd_ratio) * ce_sum
    return DistillationLoss(
        loss_sum, kd_sum.detach(), ce_sum.detach(), kl_sum.detach(), len(labels_M)
    )


def _check(
    student_logits_NV: torch.Tensor,
    teacher_logits_NV: torch.Tensor | None,
    labels_N: torch.Tensor,
    kd_ratio: float,
) -> None:
    teacher_shape = None if teacher_logits_NV is None else teacher_logits_NV.shape
    if teacher_shape not in (None, student_logits_NV.shape):
        raise ValueError(f"logits {student_logits_NV.shape} and teacher's {teacher_shape} differ")
    if labels_N.shape != student_logits_NV.shape[:1]:
        raise ValueError(f"logits {student_logits_NV.shape} and labels {labels_N.shape} differ")
    if kd_ratio > 0 and teacher_logits_NV is None:
        raise ValueError(f"a teacher must be given unless kd_ratio is 0 (it is {kd_ratio})")


def _part_sums(
    student_CV: torch.Tensor,
    teacher_CV: torch.Tensor | None,
    labels_C: torch.Tensor,
    *,
    divergence: Divergence,
    temperature: float,
    scale: float,
) -> torch.Tensor:
    """Returns [kd, ce, kl] sums of a chunk."""
    student_CV = _wide(student_CV)
    logprobs_CV = student_CV.log_softmax(dim=-1)
    ce_sum = -logprobs_CV.gather(1, labels_C[:, None]).sum()
    if teacher_CV is None:
        return torch.stack([ce_sum * 0, ce_sum, ce_sum * 0])
    teacher_CV = _wide(teacher_CV)
    divergence_C = divergence(
        (student_CV / temperature).log_softmax(dim=-1),
        (teacher_CV / temperature).log_softmax(dim=-1),
    )
    kl_sum = forward_kl(logprobs_CV.detach(), teacher_CV.log_softmax(dim=-1)).sum()
    return torch.stack([scale * divergence_C.sum(), ce_sum, kl_sum])


def _wide(logits: torch.Tensor) -> torch.Tensor:
    """Returns fp64 logits as they are, others in fp32."""
    return logits if logits.dtype == torch.float64 else logits.float()
