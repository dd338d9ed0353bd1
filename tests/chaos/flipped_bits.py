"""One flipped bit in each file of a finished run directory: `verify` names the file."""

from __future__ import annotations

import os
import shutil
import time

from tests.chaos.compare import verify_problem
from tests.chaos.damage import flip
from tests.chaos.lab import Lab
from tests.chaos.result import Result

# Not part of the result, and changed by who only looks: the lock while a run lives, signs of life.
LIVE = ("lock", "control")


def run(lab: Lab) -> Result:
    """Flips, asks `pocl-dist verify`, puts back; every file, one random bit each."""
    result = lab.result("one bit flipped in each file of a finished run directory, `verify` asked")
    _, calm = lab.whole(has_all_steps=True)
    root = lab.place("flipped-bits") / "run"
    shutil.copytree(calm, root)
    generator = lab.random("flipped_bits")
    names = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.is_file() and path.stat().st_size and path.relative_to(root).parts[0] not in LIVE
    )
    problem = verify_problem(root)
    result.check(not problem, f"before any flip: {problem}")
    for name in generator.sample(names, min(len(names), lab.count(len(names)))):
        path = root / name
        content, stat = path.read_bytes(), path.stat()
        flip(path, generator.randrange(8 * len(content)))
        started = time.monotonic()
        said = verify_problem(root)
        result.took(time.monotonic() - started)
        named = path.name in said
        result.count(
            "" if said and named else f"{name}: {'not named: ' + said if said else 'missed'}"
        )
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    problem = verify_problem(root)
    result.check(not problem, f"after the flips were undone: {problem}")
    result.notes.append(f"{len(names)} files; not looked at: {', '.join(LIVE)} (live, no result)")
    result.notes.append("worst s: one `pocl-dist verify` of the whole run directory")
    return result
