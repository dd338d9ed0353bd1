"""What doctor finds: one record per fact, with what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pocl_dist.records import JSONRecord

SEE_ABOVE = "(see above)"
"""Ends the reason of a check that an earlier finding keeps from being done."""

Severity = Literal["ok", "warning", "error", "skipped"]


class SkipError(Exception):
    """A check cannot be done here; says why, and how to have it done. That is no ok."""

    def __init__(self, why: str, how: str = "") -> None:
        super().__init__(why)
        self.how = how


@dataclass(frozen=True)
class Finding(JSONRecord):
    """One fact about a run that is to start."""

    severity: Severity
    check: str  # filled in by `examine`
    what: str
    why: str  # what it leads to
    how: str  # how to mend it
    exit_code: int | None  # of an error: what the run would end with


def ok(what: str) -> Finding:
    """Returns that something is as it should be."""
    return Finding("ok", "", what, "", "", None)


def warning(what: str, why: str, how: str) -> Finding:
    """Returns that a run would start, but perhaps not do what was meant."""
    return Finding("warning", "", what, why, how, None)


def error(exit_code: int, what: str, why: str = "", how: str = "") -> Finding:
    """Returns that a run would end with `exit_code`; `why` and `how` default to the check's."""
    return Finding("error", "", what, why, how, exit_code)


def skipped(why: str, how: str = "") -> Finding:
    """Returns that something was not looked at."""
    return Finding("skipped", "", "not looked at", why, how, None)
