"""The table of docs/doctor.md: `python -m pocl_dist.cluster.doctor.table` prints it."""

from __future__ import annotations

from pocl_dist.cluster.doctor.examine import CONFIG
from pocl_dist.cluster.doctor.registry import CHECKS


def table() -> str:
    """Returns a row per check, in Markdown."""
    rows: list[tuple[str, str, tuple[int, ...]]] = [
        (CONFIG, "all keys: type, range, contradictions; all mistakes at once", (64, 66))
    ]
    rows += [(check.name, check.looks_at, check.exit_codes) for check in CHECKS]
    lines = [
        f"| {name} | {looks_at} | {', '.join(map(str, codes)) or 'warns only'} |"
        for name, looks_at, codes in rows
    ]
    return "\n".join(["| check | looks at | exit codes |", "|---|---|---|", *lines]) + "\n"


if __name__ == "__main__":
    print(table(), end="")
