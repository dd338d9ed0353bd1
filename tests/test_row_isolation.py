"""Work by halves: what fits is done whole, a row at fault is found, a bug is not blamed on rows."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence

import pytest
import torch

from pocl_dist.distributed.row_isolation import is_out_of_memory, work_by_halves
from pocl_dist.errors import DataError

IDS = [f"r{row}" for row in range(10)]


def memory_for(num_rows: int, error: Exception) -> Callable[[Sequence[int]], list[int]]:
    calls: list[int] = []

    def work(rows: Sequence[int]) -> list[int]:
        calls.append(len(rows))
        if len(rows) > num_rows:
            raise error
        return [10 * row for row in rows]

    work.calls = calls  # type: ignore[attr-defined]
    return work


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
@pytest.mark.parametrize(
    ("num_rows", "sizes"), [(10, [10]), (5, [10, 5, 5]), (3, [10, 5, 2, 3, 5, 2, 3])]
)
def test_a_batch_that_does_not_fit_is_halved_until_it_does(
    error: Exception, num_rows: int, sizes: list[int]
) -> None:
    work = memory_for(num_rows, error)
    found = work_by_halves(work, range(10), IDS)
    assert found.result_of_row == {row: 10 * row for row in range(10)}
    assert list(found.result_of_row) == list(range(10))
    assert not found.failures and found.is_halved is (num_rows < 10)
    assert work.calls == sizes  # type: ignore[attr-defined]


def test_a_row_that_does_not_fit_alone_is_named() -> None:
    def work(rows: Sequence[int]) -> list[int]:
        if 7 in rows:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return list(rows)

    found = work_by_halves(work, [1, 6, 7, 9], IDS)
    assert list(found.result_of_row) == [1, 6, 9]
    (failure,) = found.failures
    assert (failure.example_id, failure.cause) == ("r7", "memory")
    assert failure.reason.endswith("(OutOfMemoryError: CUDA out of memory.)")


def test_a_row_that_raises_is_named_with_class_and_message() -> None:
    def work(rows: Sequence[int]) -> list[float]:
        return [1 / (row - 4) for row in rows]

    found = work_by_halves(work, range(10), IDS)
    (failure,) = found.failures
    assert (failure.example_id, failure.cause) == ("r4", "exception")
    assert failure.reason == "ZeroDivisionError: division by zero"
    assert len(found.result_of_row) == 9 and not found.is_halved


def test_what_every_row_raises_is_a_bug() -> None:
    def work(rows: Sequence[int]) -> list[int]:
        raise TypeError("of ours")

    with pytest.raises(TypeError, match="of ours"):
        work_by_halves(work, range(3), IDS)
    assert len(work_by_halves(work, [2], IDS).failures) == 1  # of a single row nobody can tell


@pytest.mark.parametrize(
    "error",
    [DataError("is bad"), OSError(errno.ENOSPC, "full"), torch.AcceleratorError("device lost")],
)
def test_what_no_row_is_to_blame_for_goes_through(error: Exception) -> None:
    work = memory_for(2, error)
    with pytest.raises(type(error)):
        work_by_halves(work, range(10), IDS)
    assert work.calls == [10] and not is_out_of_memory(error)  # type: ignore[attr-defined]


def test_the_tensors_of_a_failed_call_are_gone_before_the_next() -> None:
    import weakref

    alive: list[weakref.ref] = []

    def work(rows: Sequence[int]) -> list[int]:
        assert not any(ref() is not None for ref in alive)
        tensor = torch.zeros(4)
        alive.append(weakref.ref(tensor))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("x")
        return list(rows)

    assert len(work_by_halves(work, range(10), IDS).result_of_row) == 10
