"""Compares pinned versions with the holes in docs/security/known_bad.json; needs no network.

    python -m tests.audit [CONSTRAINTS]

`pip-audit` asks an advisory server; this list is kept by hand, from what is known for sure. A hole
that no version closes must say what guards against it. Exit code 1 names every version too old.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
LIST = ROOT / "docs" / "security" / "known_bad.json"


@dataclass(frozen=True)
class Hole:
    """One known hole of a package."""

    package: str
    fixed_in: str | None  # None: in no version
    id: str
    what: str
    guarded_by: str = ""


def read_holes(path: Path = LIST) -> list[Hole]:
    """Returns the list; ValueError for a hole that is neither fixed nor guarded."""
    holes = [Hole(**row) for row in json.loads(path.read_text())]
    bare = [hole.id for hole in holes if hole.fixed_in is None and not hole.guarded_by]
    if bare:
        raise ValueError(f"{path}: {', '.join(bare)} have neither fixed_in nor guarded_by")
    return holes


def read_pins(path: Path) -> dict[str, Version]:
    """Returns {package: version} of the `name==version` lines."""
    pins = re.findall(r"^([\w.-]+)==(\S+)", path.read_text(), re.MULTILINE)
    return {canonicalize_name(name): Version(version) for name, version in pins}


def findings(pins: dict[str, Version], holes: list[Hole]) -> list[str]:
    """Returns one line for each pinned version with a hole that a later one closes."""
    return [
        f"{hole.package} {pins[hole.package]}: {hole.id} ({hole.what}); fixed in {hole.fixed_in}"
        for hole in holes
        if hole.fixed_in and hole.package in pins and pins[hole.package] < Version(hole.fixed_in)
    ]


def main() -> None:
    """Prints what was found; exits 1 for a version that is too old."""
    constraints = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "constraints.txt"
    pins, holes = read_pins(constraints), read_holes()
    for hole in holes:
        if hole.fixed_in is None and hole.package in pins:
            print(f"audit: {hole.package}: {hole.id} is open in every version: {hole.guarded_by}")
    found = findings(pins, holes)
    for line in found:
        print(f"audit: {line}", file=sys.stderr)
    print(f"audit: {len(pins)} pinned packages, {len(holes)} known holes, {len(found)} findings")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
