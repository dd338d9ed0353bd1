"""Sampled tokens for some rows of a batch: those that the whole batch would have drawn.

`torch.multinomial` divides the probabilities (B, V) by exponential noise of their shape and takes
the largest. So a part of a batch draws the noise of the whole, and keeps its own rows of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)


class _Draw(LogitsProcessor):
    """Turns scores into numbers whose largest is the token that is drawn."""

    def __init__(self, num_rows: int, rows: Sequence[int]) -> None:
        self._num_rows = num_rows  # of the whole batch
        self._rows = list(rows)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Returns (B, V) for the rows of this part, from the default generator."""
        probs_BV = scores.softmax(dim=-1)
        noise_BV = probs_BV.new_empty(self._num_rows, probs_BV.shape[1]).exponential_(1)
        return probs_BV / noise_BV[self._rows]


def part_of_a_draw(
    temperature: float, top_p: float, num_rows: int, rows: Sequence[int]
) -> LogitsProcessorList:
    """Returns what makes `generate(do_sample=False)` sample `rows` of a batch of `num_rows`."""
    steps = LogitsProcessorList()
    if temperature != 1.0:
        steps.append(TemperatureLogitsWarper(temperature))
    if top_p < 1.0:
        steps.append(TopPLogitsWarper(top_p))
    steps.append(_Draw(num_rows, rows))
    return steps
