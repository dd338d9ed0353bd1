"""The queue of a pass, against actors that die of certain rows, or of anything."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from pocl_dist.distributed.shard_queue import ShardQueue
from pocl_dist.errors import WorkerError


@dataclass(frozen=True)
class Rows:
    """A shard."""

    rows: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    def halves(self) -> list[Rows]:
        middle = len(self.rows) // 2
        return [Rows(self.rows[:middle]), Rows(self.rows[middle:])] if middle else []


@dataclass(frozen=True)
class Outcome:
    """What came of a pass."""

    rows_of: dict[str, list[int]]
    given_up: list[int]
    num_lost: int


def run_pass(
    shards: dict[str, Rows], deadly: set[int], num_actors: int, seed: int, dead_after: int = 10**6
) -> Outcome:
    """Works a queue off with pretended actors that finish in random order.

    Those that meet a row of `deadly` die, and after `dead_after` pieces all do.
    """
    draw, given_up, done = random.Random(seed), [], {}
    queue = ShardQueue(shards, num_actors, lambda _: None, lambda _n, row, _r: given_up.append(row))
    at_work, num_lost, num_done = [], 0, 0
    while queue.num_open:
        while len(at_work) < num_actors and (piece := queue.take()):
            at_work.append(piece)
        piece = at_work.pop(draw.randrange(len(at_work)))
        if num_done >= dead_after or deadly & set(piece.shard.rows):
            num_lost += 1
            finished = queue.lost(piece, "SIGKILL")
        else:
            num_done += 1
            finished = queue.done(piece, list(piece.shard.rows))
        done.update(finished)
    rows_of = {name: [row for part in parts for row in part] for name, parts in done.items()}
    return Outcome(rows_of, sorted(shard.rows[0] for shard in given_up), num_lost)


def cut(num_rows: int, shard_size: int) -> dict[str, Rows]:
    rows = range(num_rows)
    starts = range(0, num_rows, shard_size)
    return {f"s{start}": Rows(tuple(rows[start : start + shard_size])) for start in starts}


@pytest.mark.parametrize("num_actors", [1, 2, 5])
def test_all_rows_but_the_deadly_ones_are_done_once_and_in_order(num_actors: int) -> None:
    for seed in range(60):
        draw = random.Random(seed)
        shards = cut(draw.randint(2, 40), draw.randint(1, 16))
        all_rows = [row for shard in shards.values() for row in shard.rows]
        deadly = set(draw.sample(all_rows, min(len(all_rows) - 1, draw.randint(0, 2))))
        try:
            found = run_pass(shards, deadly, num_actors, seed)
        except WorkerError:
            assert len(all_rows) - len(deadly) <= 2, (
                "hardly anything else could show who is to blame"
            )
            continue
        assert found.given_up == sorted(deadly)
        expected = {
            name: [row for row in shard.rows if row not in deadly] for name, shard in shards.items()
        }
        assert found.rows_of == expected


def test_one_deadly_row_of_128_costs_three_actors_and_two_and_the_way_down() -> None:
    found = run_pass({"s": Rows(tuple(range(128)))}, {77}, num_actors=1, seed=0)
    assert found.given_up == [77] and found.num_lost == 3 + 6 + 2


@pytest.mark.parametrize("dead_after", [0, 1, 7])
@pytest.mark.parametrize("shard_size", [1, 2, 128])
@pytest.mark.parametrize("num_actors", [1, 4])
def test_actors_that_die_of_anything_end_the_pass_soon_and_no_row_is_blamed(
    dead_after: int, shard_size: int, num_actors: int
) -> None:
    blamed: list[Rows] = []
    queue = ShardQueue(
        cut(40 * shard_size, shard_size),
        num_actors,
        lambda _: None,
        lambda *row: blamed.append(row[1]),
    )
    num_lost = 0
    at_work = []
    with pytest.raises(WorkerError, match="whatever their work"):
        for number in range(10**6):
            while len(at_work) < num_actors and (piece := queue.take()):
                at_work.append(piece)
            if number < dead_after:
                list(queue.done(at_work.pop(0), []))
            else:
                num_lost += 1
                list(queue.lost(at_work.pop(0), "SIGKILL"))
    assert not blamed and num_lost <= 3 * (num_actors + 3)


def test_without_a_way_to_give_up_rows_the_third_loss_ends_the_pass() -> None:
    queue = ShardQueue({"s": Rows((1, 2))}, 1, lambda _: None, None)
    for _ in range(2):
        piece = queue.take()
        assert piece is not None and not list(queue.lost(piece, "x"))
    piece = queue.take()
    assert piece is not None
    with pytest.raises(WorkerError, match=r"^s: its actor died, attempt 3 of 3: x"):
        list(queue.lost(piece, "x"))
