"""Mean cross-entropy of the reference response under the student, incl. eos, at temperature 1."""

from __future__ import annotations

from pocl_dist.difficulty.signals.signal import AnsweredBatch, Signal


def compute(batch: AnsweredBatch) -> list[float]:
    """Returns each row's mean in nats, fp32; the caller quarantines one that is not finite."""
    return list(batch.cross_entropies)


SIGNAL = Signal("cross_entropy", higher_is_easier=False, compute=compute)
