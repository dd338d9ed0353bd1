"""Difficulty signals: one file each.

To add one: (1) a file here with a `SIGNAL` (name, direction, how to compute it); (2) an entry in
SIGNALS below; (3) a field of its name in `records.DifficultyRecord`. The worker then computes it,
fusion ranks by it, plan writes it and its `rank_` beside the ranking, and the tests find it.
"""

from pocl_dist.difficulty.signals.cross_entropy import SIGNAL as _CROSS_ENTROPY
from pocl_dist.difficulty.signals.rouge_l import SIGNAL as _ROUGE_L
from pocl_dist.difficulty.signals.signal import AnsweredBatch, Signal

SIGNALS: dict[str, Signal] = {signal.name: signal for signal in (_ROUGE_L, _CROSS_ENTROPY)}

__all__ = ["SIGNALS", "AnsweredBatch", "Signal"]
