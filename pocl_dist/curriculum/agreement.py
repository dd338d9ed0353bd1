"""Before each step all ranks exchange a digest of what they have *applied*.

So a rank that trains something else is caught and named instead of spoiling the run in silence.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from pocl_dist.curriculum.coordinator import Instruction
from pocl_dist.distributed.collectives import gather_ints
from pocl_dist.distributed.process_group import Rank
from pocl_dist.errors import WorkerError


def applied_digest(
    instruction: Instruction,
    temperature: float,
    kd_ratio: float,
    learning_rate: float,
    example_ids: Sequence[str],
) -> int:
    """Returns 63 bits over what this rank is about to train with: read back, not as received."""
    numbers = struct.pack(
        "<qqqddd",
        instruction.step,
        instruction.stage,
        instruction.step_in_stage,
        temperature,
        kd_ratio,
        learning_rate,
    )
    digest = hashlib.sha256(numbers + "\0".join(example_ids).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True)
class Agreement:
    """What the ranks told each other before a step."""

    num_label_tokens: int  # over all ranks
    is_stop_asked: bool  # by any rank


def agree(
    digest: int, num_label_tokens: int, is_stop_asked: bool, instruction: Instruction, rank: Rank
) -> Agreement:
    """Exchanges digest, token count and stop flag. Collective.

    Raises WorkerError (71), on all ranks, naming those that applied something else than rank 0.
    """
    rows = gather_ints([digest, num_label_tokens, int(is_stop_asked)], rank)
    strays = [index for index, row in enumerate(rows) if row[0] != rows[0][0]]
    if strays:
        raise WorkerError(
            f"step {instruction.step}, stage {instruction.stage}: "
            f"rank(s) {', '.join(map(str, strays))} applied another stage, temperature, "
            "KD ratio, learning rate or batch than rank 0; the step was not taken"
        )
    return Agreement(sum(row[1] for row in rows), any(row[2] for row in rows))
