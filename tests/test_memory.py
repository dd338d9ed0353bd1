"""What ZeRO leaves on a rank, against the formula of the paper."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pocl_dist.distributed.zero_bytes import expected_bytes
from tests.ranks import run_ranks

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def _measured(zero_stage: int) -> dict[str, dict[str, int]]:
    sys.path.insert(0, str(BENCHMARKS))
    from bench_memory import measure_rank

    return measure_rank(zero_stage, hidden=128)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_ranks_hold_what_the_formula_says(zero_stage: int) -> None:
    for row in run_ranks(_measured, 2, zero_stage):
        for kind, wanted in row["expected_bytes"].items():
            assert row["held_bytes"][kind] == pytest.approx(wanted, rel=0.1), kind


def test_all_that_a_parameter_needs_is_shared_by_all_ranks_under_stage_three() -> None:
    alone, shared = expected_bytes(10**6, 0, 1), expected_bytes(10**6, 3, 8)
    assert alone.parameters + alone.gradients + alone.optimizer == 16 * 10**6
    assert shared.parameters + shared.gradients + shared.optimizer == 20 * 10**6 / 8
