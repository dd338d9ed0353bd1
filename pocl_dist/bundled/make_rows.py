"""Writes train.jsonl, dev.jsonl and test.jsonl: the bundled instruction rows.

Run it as `python -m pocl_dist.bundled.make_rows [FOLDER]`. The same seed gives the same bytes.

With `--more dev=280,test=1008` it writes further rows instead, into FOLDER/dev.jsonl and
FOLDER/test.jsonl, none of which asks what a bundled row asks: for figures that are less noisy.
"""

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from pocl_dist.bundled.tasks import TASKS, Exercise

SEED = 2506
SPLIT_SIZES = {"train": 1600, "dev": 96, "test": 200}
FOLDER = Path(__file__).parent


def prompt_key(exercise: Exercise) -> tuple[str, str]:
    """What makes two rows the same question."""
    return exercise.instruction, exercise.input


def tasks_in_turn() -> Iterator[str]:
    """Task names round and round: every stretch of rows holds every task equally often."""
    while True:
        yield from TASKS


def unseen_exercises(
    rng: random.Random, num_rows: int, seen: set[tuple[str, str]]
) -> list[tuple[str, Exercise]]:
    """`num_rows` exercises with their tasks, none of them in `seen`; adds them to `seen`."""
    chosen: list[tuple[str, Exercise]] = []
    for _, task in zip(range(num_rows), tasks_in_turn(), strict=False):
        exercise = TASKS[task](rng)
        while prompt_key(exercise) in seen:
            exercise = TASKS[task](rng)
        seen.add(prompt_key(exercise))
        chosen.append((task, exercise))
    rng.shuffle(chosen)
    return chosen


def generated_exercises(seed: int, num_rows: int, held_out: set[tuple[str, str]]) -> list[Exercise]:
    """More exercises to pretrain on, the tasks in turn; none asks a question of `held_out`."""
    rng = random.Random(seed)
    names = list(TASKS)
    chosen: list[Exercise] = []
    while len(chosen) < num_rows:
        exercise = TASKS[names[len(chosen) % len(names)]](rng)
        if prompt_key(exercise) not in held_out:
            chosen.append(exercise)
    return chosen


def read_split(folder: Path, split: str) -> list[Exercise]:
    """The exercises of one split that `write_rows` wrote into `folder`."""
    lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [Exercise(row["instruction"], row["input"], row["output"]) for row in rows]


def _write_split(path: Path, num_rows: int, rng: random.Random, seen: set[tuple[str, str]]) -> None:
    lines = [
        json.dumps({"id": f"{path.stem}-{number:04d}", **asdict(exercise), "task": task})
        for number, (task, exercise) in enumerate(unseen_exercises(rng, num_rows, seen))
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_rows(folder: Path) -> None:
    """Writes the three splits into `folder`; no question is in two of them."""
    rng = random.Random(SEED)
    seen: set[tuple[str, str]] = set()
    # dev and test come first: train then has whatever is left of the small task families.
    for split in ("dev", "test", "train"):
        _write_split(folder / f"{split}.jsonl", SPLIT_SIZES[split], rng, seen)


def write_more_rows(folder: Path, sizes: dict[str, int]) -> None:
    """Writes `{name: number of rows}` into `folder`; no question twice, none of a bundled row."""
    rng = random.Random(SEED + 1)
    seen = {prompt_key(row) for split in SPLIT_SIZES for row in read_split(FOLDER, split)}
    for name, num_rows in sizes.items():
        _write_split(folder / f"{name}.jsonl", num_rows, rng, seen)


def _sizes(text: str) -> dict[str, int]:
    try:
        sizes = {name: int(rows) for name, _, rows in (w.partition("=") for w in text.split(","))}
    except ValueError:
        sizes = {}
    # `count_up`, the smallest of the 14 families, has some 400 questions left; the search for more
    # would never end.
    is_allowed = all(name.isidentifier() and rows > 0 for name, rows in sizes.items())
    if not is_allowed or not 0 < sum(sizes.values()) <= 5000:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=ROWS[,NAME=ROWS...] with 1 to 5000 rows in all"
        )
    return sizes


def main() -> None:
    """Writes the rows beside this file, or into the folder given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    parser.add_argument(
        "--more",
        type=_sizes,
        metavar="NAME=ROWS[,...]",
        default={},
        help="further rows: at most 5000, into FOLDER/NAME.jsonl",
    )
    options = parser.parse_args()
    folder: Path = options.folder
    if options.more and folder.resolve() == FOLDER.resolve():
        parser.error("--more: name a folder, the bundled rows stay as they are")
    folder.mkdir(parents=True, exist_ok=True)
    if options.more:
        write_more_rows(folder, options.more)
    else:
        write_rows(folder)


if __name__ == "__main__":
    main()
