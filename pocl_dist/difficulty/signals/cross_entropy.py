"""Mean cross-entropy of the reference response under the student, incl. eos, at temperature 1."""

from __future__ import annotations

from pocl_dist.difficulty.signals.signal import AnsweredBatch, Signal


def compute(batch: AnsweredBatch) -> list[float]:
    """Returns each row's mean in nats, fp32; the caller quarantines one that is not finite."""
    # Not at module level: fusion and plan read this declaration and run without torch.
    from pocl_dist.data.encoding import collate, pad_id_of
    from pocl_dist.models.generation import mean_cross_entropies

    rows = collate(batch.examples, pad_id_of(batch.tokenizer))
    return mean_cross_entropies(batch.model, rows, len(batch.tokenizer))


SIGNAL = Signal("cross_entropy", higher_is_easier=False, compute=compute)
