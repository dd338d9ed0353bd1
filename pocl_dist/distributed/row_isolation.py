"""Work on the rows of a batch: all at once; if that fails, by halves, down to the row at fault."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from pocl_dist.errors import PoclError
from pocl_dist.failpoints import failpoint
from pocl_dist.records import RowFailure

T = TypeVar("T")

# What a CPU allocator says, in a RuntimeError without a class of its own.
_NO_HOST_MEMORY = ("can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class Isolated(Generic[T]):
    """What came of a batch: results by row, the rows at fault, whether it had to be cut."""

    result_of_row: dict[int, T]
    failures: tuple[RowFailure, ...]
    is_halved: bool  # for lack of memory


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether fewer rows at once may help."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_HOST_MEMORY)


def work_by_halves(
    work: Callable[[Sequence[int]], Sequence[T]], rows: Sequence[int], ids: Sequence[str]
) -> Isolated[T]:
    """Returns what `work` gives for each of `rows`; `ids` are those of the whole batch.

    A call that runs out of memory, or raises, is made again for each half of its rows. Errors of
    ours, of files and of a broken device go through: no row is at fault. So does an exception
    that every single row of a batch of several raises: it is a bug.
    """
    results: dict[int, T] = {}
    errors: dict[int, Exception] = {}
    is_halved = False
    todo = [list(rows)]
    while todo:
        part = todo.pop(0)
        try:
            failpoint("actor.before_batch")
            results |= zip(part, work(part), strict=True)
            failpoint("actor.after_batch")
            continue
        except (PoclError, OSError, torch.AcceleratorError):
            raise
        except Exception as error:
            failure = error
        _free_memory(failure)
        is_halved |= is_out_of_memory(failure) and len(part) > 1
        if len(part) == 1:
            errors[part[0]] = failure
        else:
            middle = len(part) // 2
            todo[:0] = [part[:middle], part[middle:]]
    _raise_if_bug(errors, len(rows))
    failures = tuple(_describe(ids[row], error) for row, error in sorted(errors.items()))
    return Isolated(results, failures, is_halved)


def _free_memory(error: Exception) -> None:
    """Lets go of what the failed call allocated: the frames of its traceback hold it."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _raise_if_bug(errors: dict[int, Exception], num_rows: int) -> None:
    raised = [error for error in errors.values() if not is_out_of_memory(error)]
    if num_rows > 1 and len(raised) == num_rows and len({type(error) for error in raised}) == 1:
        raise raised[0]


def _describe(example_id: str, error: Exception) -> RowFailure:
    text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    if is_out_of_memory(error):
        reason = f"the row alone does not fit into memory ({text})"
        return RowFailure(example_id, "memory", reason)
    return RowFailure(example_id, "exception", text)
