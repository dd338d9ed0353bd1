"""Which shard comes next, and what becomes of one that loses its actor. Knows no Ray.

A shard is tried three times; then it is cut in halves, each of which is cut again when it loses an
actor, down to the row that kills. Pieces wait at the end of the queue, so the rest is done first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, Self, TypeVar

from pocl_dist.errors import WorkerError

MAX_ATTEMPTS = 3
# A single row, cut out of a shard, is given up when it has lost this many actors of its own.
MAX_ROW_ATTEMPTS = 2


class Shard(Protocol):
    """What an actor is sent."""

    @property
    def num_rows(self) -> int:
        """Returns the rows that count as done with it."""
        ...

    def halves(self) -> Sequence[Self]:
        """Returns the two halves of its rows; none when there is only one."""
        ...


class Batch(Protocol):
    """Rows that go through a model together."""

    @property
    def rows(self) -> Sequence[int]:
        """Returns which of its rows are asked for."""
        ...

    def only(self, rows: Sequence[int]) -> Self:
        """Returns the batch with these rows asked for; the others still decide the padding."""
        ...


ShardT = TypeVar("ShardT", bound=Shard)
BatchT = TypeVar("BatchT", bound=Batch)


def halves_of(batches: Sequence[BatchT]) -> tuple[tuple[BatchT, ...], ...]:
    """Returns a shard's batches in two parts, a single batch's rows in two, a row's in none."""
    if len(batches) > 1:
        middle = len(batches) // 2
        return tuple(batches[:middle]), tuple(batches[middle:])
    (batch,) = batches
    middle = len(batch.rows) // 2
    parts = (batch.rows[:middle], batch.rows[middle:]) if middle else ()
    return tuple((batch.only(rows),) for rows in parts)


@dataclass(frozen=True)
class Piece(Generic[ShardT]):
    """A shard, or a part of it: `path` holds 0 or 1 for each cut that led to it."""

    name: str  # of the whole shard
    shard: ShardT
    path: tuple[int, ...] = ()
    num_lost: int = 0
    num_done_before: int = 0  # pieces of the pass that were done when the shard first lost an actor

    @property
    def title(self) -> str:
        """Returns its name for messages."""
        rows = f"{self.shard.num_rows} row{'s' if self.shard.num_rows > 1 else ''}"
        return f"{self.name} ({rows} of it)" if self.path else self.name


class ShardQueue(Generic[ShardT]):
    """The shards of a pass, until each is done."""

    def __init__(
        self,
        shards: Mapping[str, ShardT],
        num_actors: int,
        note: Callable[[str], None],
        give_up: Callable[[str, ShardT, str], None] | None,
    ) -> None:
        self.num_open = len(shards)
        self._shards = shards
        # A name is a whole shard, which may be made only when it is asked for.
        self._waiting: deque[Piece[ShardT] | str] = deque(shards)
        self._num_pieces = dict.fromkeys(shards, 1)  # of each open shard: waiting, at work, held
        self._results: dict[str, dict[tuple[int, ...], object]] = {name: {} for name in shards}
        self._held: list[tuple[Piece[ShardT], str]] = []  # rows that kill, until work gets done
        self._num_done = 0
        self._num_lost_in_a_row = 0
        # Each actor may lose a shard three times, and the search for a row some more.
        self._most_in_a_row = MAX_ATTEMPTS * (num_actors + MAX_ATTEMPTS)
        self._note = note
        self._give_up = give_up

    def take(self) -> Piece[ShardT] | None:
        """Returns what to do next, None when nothing waits."""
        if not self._waiting:
            return None
        found = self._waiting.popleft()
        return Piece(found, self._shards[found]) if isinstance(found, str) else found

    def done(self, piece: Piece[ShardT], result: object) -> Iterator[tuple[str, list[object]]]:
        """Takes a piece's result; yields (name, results) of shards that are complete with it."""
        self._num_done += 1
        self._num_lost_in_a_row = 0
        self._results[piece.name][piece.path] = result
        yield from self._close(piece)
        yield from self._give_up_held()

    def lost(self, piece: Piece[ShardT], reason: str) -> Iterator[tuple[str, list[object]]]:
        """Takes note of a piece whose actor died; yields as `done` does.

        Raises WorkerError (71) when no row may be given up, or actors die whatever their work is.
        """
        if not piece.path and not piece.num_lost:
            piece = replace(piece, num_done_before=self._num_done)
        piece = replace(piece, num_lost=piece.num_lost + 1)
        halves = piece.shard.halves()
        most = MAX_ATTEMPTS if not piece.path else 1 if halves else MAX_ROW_ATTEMPTS
        what = f"{piece.title}: its actor died, attempt {piece.num_lost} of {most}"
        self._num_lost_in_a_row += 1
        if self._num_lost_in_a_row >= self._most_in_a_row:
            raise WorkerError(
                f"{self._num_lost_in_a_row} actors died in a row, whatever their work was; "
                f"the last: {what}: {reason}"
            )
        if piece.num_lost < most:
            self._note(f"{what}; trying again ({reason})")
            self._waiting.appendleft(piece)
        elif self._give_up is None:
            raise WorkerError(f"{what}: {reason}")
        elif halves:
            self._note(f"{what}; looking for the row that kills it ({reason})")
            self._num_pieces[piece.name] += len(halves) - 1
            for number, half in enumerate(halves):
                path = (*piece.path, number)
                self._waiting.append(replace(piece, shard=half, path=path, num_lost=0))
        else:
            self._held.append((piece, f"{what}: {reason}"))
            yield from self._give_up_held()

    def _give_up_held(self) -> Iterator[tuple[str, list[object]]]:
        """Gives up rows that kill once other work is done: until then it may be the actors.

        Of the last rows of a pass any work before must do. Raises WorkerError (71) without any.
        """
        is_last = self._num_done > 0 and len(self._held) == sum(self._num_pieces.values())
        ready = [held for held in self._held if is_last or self._num_done > held[0].num_done_before]
        self._held = [held for held in self._held if held not in ready]
        num_others = sum(self._num_pieces.values()) - len(self._held) - len(ready)
        if self._held and not num_others:
            raise WorkerError(f"actors die, whatever their work is; {self._held[0][1]}")
        for piece, reason in ready:
            assert self._give_up is not None, "without it no row is held"
            self._give_up(piece.name, piece.shard, reason)
            yield from self._close(piece)

    def _close(self, piece: Piece[ShardT]) -> Iterator[tuple[str, list[object]]]:
        self._num_pieces[piece.name] -= 1
        if not self._num_pieces[piece.name]:
            self.num_open -= 1
            results = self._results.pop(piece.name)
            yield piece.name, [results[path] for path in sorted(results)]
