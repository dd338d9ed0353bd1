"""ROUGE-L F1 of the student's greedy answer against the reference it would be trained on."""

from __future__ import annotations

from pocl_dist.difficulty.signals.signal import AnsweredBatch, Signal
from pocl_dist.metrics import rouge_l


def compute(batch: AnsweredBatch) -> list[float]:
    """Returns the F1 of each answer, 0..1; only the first reference counts, as in training."""
    pairs = zip(batch.answers, batch.references, strict=True)
    return [rouge_l(answer, references[:1]) for answer, references in pairs]


SIGNAL = Signal("rouge_l", higher_is_easier=True, compute=compute)
