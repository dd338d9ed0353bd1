"""What an experiment found, and the table of docs/reliability.md."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- chaos: begin -->", "<!-- chaos: end -->"
PACKAGES = ("torch", "deepspeed", "ray", "transformers", "safetensors", "hypothesis")


@dataclass
class Result:
    """Counts of one experiment. A fault is survived when its end is the one that is promised."""

    fault: str  # what was done, a few words for the table
    seed: int
    num_faults: int = 0
    num_survived: int = 0
    num_compared: int = 0  # ends that were compared with an undisturbed run
    num_identical: int = 0
    worst_seconds: float | None = None  # from the fault to the end of the last process, or as noted
    seconds: float = 0.0  # of the experiment
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    is_skipped: bool = False  # it cannot be done here; a note says why

    def count(self, problem: str = "") -> None:
        """Counts a fault: survived, or not, with the reason."""
        self.num_faults += 1
        if problem:
            self.failures.append(problem)
        else:
            self.num_survived += 1

    def compare(self, differing: Sequence[str], where: object = "") -> None:
        """Counts an end, given the names in which it differs from the undisturbed one."""
        self.num_compared += 1
        if differing:
            self.failures.append(f"{where}: differs in {', '.join(differing[:5])}")
        else:
            self.num_identical += 1

    def check(self, is_true: object, otherwise: str) -> None:
        """Notes a failure of something that is no fault of its own."""
        if not is_true:
            self.failures.append(otherwise)

    def took(self, seconds: float) -> None:
        """Keeps the worst time."""
        self.worst_seconds = max(self.worst_seconds or 0.0, seconds)

    @property
    def is_good(self) -> bool:
        """Returns whether all is as promised, and something was done at all."""
        is_done = self.is_skipped or self.num_faults == self.num_survived > 0
        return is_done and not self.failures


def _cells(name: str, result: Result) -> list[str]:
    worst = "" if result.worst_seconds is None else f"{result.worst_seconds:.1f}"
    same = f"{result.num_identical} of {result.num_compared}" if result.num_compared else ""
    verdict = "ok" if result.is_good else f"**FAILED** ({len(result.failures)})"
    verdict = "skipped" if result.is_skipped else verdict
    return [
        f"`{name}`", result.fault, str(result.num_faults), str(result.num_survived), same, worst,
        f"{result.seconds:.0f}", verdict,
    ]  # fmt: skip


def table(results: dict[str, Result], command: str) -> str:
    """Returns the table as Markdown, with how it was made."""
    heads = ["experiment", "fault", "faults", "survived", "identical ends", "worst s", "took s", ""]
    rows = [heads, ["---"] * len(heads)]
    rows += [_cells(name, result) for name, result in results.items()]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    seeds = ", ".join(sorted({str(result.seed) for result in results.values()}))
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    total = sum(result.seconds for result in results.values())
    notes = [f"- `{name}`: {note}" for name, result in results.items() for note in result.notes]
    faults = [
        f"- **FAILED** `{name}`: {failure}"
        for name, result in results.items()
        for failure in result.failures[:5]
    ]
    return "\n".join(
        [
            f"Made by `{command}` on {time.strftime('%Y-%m-%d', time.gmtime())} in "
            f"{total / 60:.0f} minutes; seed {seeds}; Python {platform.python_version()}, "
            f"{versions}.",
            "",
            *lines,
            *(["", *faults] if faults else []),
            *(["", "Notes:", "", *notes] if notes else []),
        ]
    )


def write_table(text: str, page: Path = PAGE) -> None:
    """Puts the table between the markers of the page; the prose around it stays."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
