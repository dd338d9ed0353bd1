"""Files of a checkpoint truncated, flipped, removed, swapped: found, never loaded (T4)."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.chaos.lab import Lab
from tests.chaos.result import Result

NUM_FLIPS = 200
Damage = tuple[str, Callable[[Path], object]]  # what, done to the newest checkpoint's folder


def _truncate(name: str, size: int) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:size])

    return damage


def flip(path: Path, bit: int) -> None:
    """Flips one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(content))


def _flip(name: str, bit: int) -> Callable[[Path], object]:
    return lambda folder: flip(folder / name, bit)


def _swap(first: str, second: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (folder / first).rename(folder / "between")
        (folder / second).rename(folder / first)
        (folder / "between").rename(folder / second)

    return damage


def _replace_from(other: Path, name: str) -> Callable[[Path], object]:
    return lambda folder: shutil.copyfile(other / name, folder / name)


def damages(newest: Path, before: Path, num_flips: int, generator: random.Random) -> list[Damage]:
    """Returns all damages to try on copies of the checkpoint `newest`."""
    names = sorted(path.name for path in newest.iterdir())
    found: list[Damage] = []
    for name in names:
        size = (newest / name).stat().st_size
        for cut in sorted({0, 1, size // 2, size - 1}):
            found.append((f"{name} cut to {cut} bytes", _truncate(name, cut)))
        found.append((f"{name} removed", lambda folder, name=name: (folder / name).unlink()))
        found.append((f"{name} of another step", _replace_from(before, name)))
    tensors = [name for name in names if name.endswith(".safetensors")]
    if len(tensors) > 1:
        found.append(("two ranks' files swapped", _swap(tensors[0], tensors[1])))
    for turn in range(num_flips):
        name = names[turn % len(names)]
        bit = generator.randrange(8 * (newest / name).stat().st_size)
        found.append((f"{name}: bit {bit} flipped", _flip(name, bit)))
    return found


def _content(checkpoint: object) -> str:
    """Returns a digest over all that would be loaded: every tensor and number of a checkpoint."""
    from pocl_dist.distributed.checkpoint import Checkpoint

    assert isinstance(checkpoint, Checkpoint)
    total = hashlib.sha256()
    for name, value in sorted(vars(checkpoint).items()):
        if name != "folder":
            total.update(f"{name}={value!r};".encode())
    for path in sorted(checkpoint.folder.glob("*.safetensors")):
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


def _try_all(source: str, work: str, num_flips: int, seed: str) -> Iterator[tuple[str, str]]:
    """Yields (what, problem) of each damage; runs on a rank."""
    from pocl_dist.distributed.checkpoint import MANIFEST, find_checkpoint
    from pocl_dist.distributed.process_group import join_process_group
    from pocl_dist.errors import PoclError

    rank = join_process_group(60)
    newest, before = sorted(Path(source).glob("step-*"), reverse=True)[:2]
    run_digest = str(json.loads((newest / MANIFEST).read_text())["digests"]["run"])
    good = _content(find_checkpoint(_copy(Path(source), Path(work)), rank, run_digest))
    shutil.rmtree(Path(work) / newest.name)
    fallback = _content(find_checkpoint(Path(work), rank, run_digest))
    for what, damage in damages(newest, before, num_flips, random.Random(seed)):
        folder = _copy(Path(source), Path(work))
        damage(folder / newest.name)
        try:
            found = find_checkpoint(folder, rank, run_digest)
            content = "" if found is None else _content(found)
        except PoclError as error:
            yield what, f"no fallback: {error}"
            continue
        except Exception as error:  # a crash is what this looks for
            yield what, f"crashed: {type(error).__name__}: {error}"
            continue
        if content == fallback:
            yield what, ""
        else:
            loaded = "not noticed" if content == good else "WRONG STATE LOADED SILENTLY"
            yield what, loaded if content else "nothing was found"


def _copy(source: Path, work: Path) -> Path:
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(source, work)
    return work


def _child(source: str, work: str, num_flips: int, seed: str) -> list[tuple[str, str]]:
    return list(_try_all(source, work, num_flips, seed))


def run(lab: Lab, num_flips: int = NUM_FLIPS) -> Result:
    """Damages copies of one checkpoint in every way and asks for the newest good one."""
    from tests.ranks import run_ranks

    result = lab.result("a file of the newest checkpoint truncated, flipped, removed or swapped")
    lab.trained()
    source = lab.folder / "calm-training" / "run" / "checkpoints"
    work, seed = lab.place("damage") / "checkpoints", f"{lab.seed} damage"
    rows = run_ranks(_child, 1, str(source), str(work), lab.count(num_flips), seed)[0]
    for what, problem in rows:
        result.count(f"{what}: {problem}" if problem else "")
    silent = sum("SILENTLY" in problem for _, problem in rows)
    result.notes.append(
        f"{silent} of {len(rows)} damaged checkpoints were loaded without a word; "
        "raw tensor formats: all flips (OPERATIONS.md, 600 of 600)"
    )
    return result
