"""The element-wise part of a call, block by block of rows that fit the cache.

C tokens of a chunk, B rows of a block, R real tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pocl_dist.losses.call import Objective, Tokens
from pocl_dist.losses.compiled import BLOCK_COMPILER
from pocl_dist.losses.elementwise import Factors, block_terms
from pocl_dist.losses.head_logits import through_head

BLOCK_ELEMENTS = {"compiled": 2**21, "eager": 2**19}
"""Logits per block on a CPU. Compiled code keeps one row in the cache whatever the block, and wants
few calls; uncompiled code keeps every intermediate result there (measured, 2 MiB of L2 per core).
"""


@dataclass(frozen=True)
class ScalarSums:
    """Running sums on the device, added to in place so that no chunk waits for the host."""

    loss: torch.Tensor
    kd_loss: torch.Tensor
    ce_loss: torch.Tensor
    kl: torch.Tensor


class Blocks:
    """The element-wise part of a call: cuts chunks into blocks and adds them to the sums."""

    def __init__(
        self, tokens: Tokens, objective: Objective, sums: ScalarSums, *, needs_grad: bool
    ) -> None:
        self.tokens, self.objective, self.sums = tokens, objective, sums
        self.kind = objective.kind(needs_grad=needs_grad)
        self.factors = objective.factors()
        if tokens.is_compiled:
            self.factors = Factors(*(torch.full_like(sums.loss, float(x)) for x in self.factors))

    def add(
        self,
        rows_C: torch.Tensor,
        logits_CR: torch.Tensor,
        teacher_logits_CR: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Adds a chunk to the sums; returns d loss / d (hidden @ weight.T + bias), or None.

        The logits are overwritten where the chunk is more than one block.
        """
        labels_C1 = self.tokens.labels_N.index_select(0, rows_C).unsqueeze(1)
        num_blocks = self._num_blocks(logits_CR)
        teacher_blocks: Sequence[torch.Tensor | None] = (
            [None] * num_blocks
            if teacher_logits_CR is None
            else teacher_logits_CR.tensor_split(num_blocks)
        )
        blocks = zip(
            logits_CR.tensor_split(num_blocks),
            teacher_blocks,
            labels_C1.tensor_split(num_blocks),
            strict=True,
        )
        for logits_BR, teacher_logits_BR, labels_B1 in blocks:
            grad_BR = self._add_block(logits_BR, teacher_logits_BR, labels_B1)
            if grad_BR is None or num_blocks == 1:
                continue
            logits_BR.copy_(grad_BR)
        if grad_BR is None:
            return None
        return grad_BR if num_blocks == 1 else logits_CR

    def _num_blocks(self, logits_CR: torch.Tensor) -> int:
        """Returns how many blocks a chunk has; an accelerator wants all rows at once."""
        if logits_CR.device.type != "cpu":
            return 1
        elements = BLOCK_ELEMENTS["compiled" if self.tokens.is_compiled else "eager"]
        rows_per_block = max(1, elements // logits_CR.shape[1])
        return -(-len(logits_CR) // rows_per_block)

    def _add_block(
        self,
        logits_BR: torch.Tensor,
        teacher_logits_BR: torch.Tensor | None,
        labels_B1: torch.Tensor,
    ) -> torch.Tensor | None:
        """Adds a block to the sums; returns its gradient for the scores, or None."""
        if self.tokens.is_compiled:
            terms = BLOCK_COMPILER.block_terms(
                self.tokens.compile_mode, self.kind, logits_BR, teacher_logits_BR, self.factors
            )
        else:
            terms = block_terms(self.kind, logits_BR, teacher_logits_BR, self.factors)
        kd_ratio, sums = self.objective.kd_ratio, self.sums
        ce_loss = (terms.log_normalizer_B - logits_BR.gather(1, labels_B1).squeeze(1)).sum()
        sums.ce_loss.add_(ce_loss)
        sums.loss.add_(ce_loss, alpha=1 - kd_ratio)
        if terms.divergence_B is not None and terms.kl_B is not None:
            kd_loss = self.objective.scale * terms.divergence_B.sum()
            sums.kd_loss.add_(kd_loss)
            sums.loss.add_(kd_loss, alpha=kd_ratio)
            sums.kl.add_(terms.kl_B.sum())
        grad_BR = terms.grad_logits_BR
        if grad_BR is None:
            return None
        if self.kind.has_ce_gradient:
            label_part_B1 = grad_BR.new_full(labels_B1.shape, kd_ratio - 1)
            grad_BR.scatter_add_(1, labels_B1, label_part_B1)
        return through_head(grad_BR, logits_BR, self.tokens.student_head)
