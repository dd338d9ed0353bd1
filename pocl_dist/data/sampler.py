"""Which examples, in which order: a function of (seed, stage, epoch) alone.

Positions are global: the same batches come out for 1, 2, 8 or 16 ranks, and a resumed run asks for
step s instead of replaying s steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=1)  # four bytes per example; steps come in order, so one epoch is enough
def _permutation(seed: int, stage: int, epoch: int, num_examples: int) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, stage, epoch])))
    places = np.arange(num_examples, dtype=np.int32)
    generator.shuffle(places)  # as `permutation` does, which would take eight bytes
    return places


def num_visits(num_examples: int, epochs: float) -> int:
    """Returns the example visits of a stage; part of an epoch rounds up to a whole example."""
    return max(1, math.ceil(num_examples * epochs - 1e-9))


def num_steps(num_examples: int, epochs: float, global_batch_size: int) -> int:
    """Returns ceil(num_examples * epochs / global_batch_size)."""
    return math.ceil(num_visits(num_examples, epochs) / global_batch_size)


@dataclass(frozen=True)
class StageSampler:
    """The batches of one stage: epochs of fresh permutations, end to end, cut by the batch size.

    A batch may span two epochs; the last batch of the stage is smaller.
    """

    seed: int
    stage: int
    num_examples: int
    epochs: float
    global_batch_size: int

    @property
    def num_steps(self) -> int:
        """Returns the optimizer steps of the stage."""
        return num_steps(self.num_examples, self.epochs, self.global_batch_size)

    def epoch_of(self, step: int) -> int:
        """Returns the epoch in which the step's first example lies."""
        return step * self.global_batch_size // self.num_examples

    def batch(self, step: int) -> list[int]:
        """Returns positions in the ranking, each < `num_examples`, of the stage's step `step`."""
        start = step * self.global_batch_size
        stop = min(start + self.global_batch_size, num_visits(self.num_examples, self.epochs))
        positions: list[int] = []
        while start < stop:
            epoch, offset = divmod(start, self.num_examples)
            places = _permutation(self.seed, self.stage, epoch, self.num_examples)
            part = places[offset : offset + stop - start]
            positions += part.tolist()
            start += len(part)
        return positions
