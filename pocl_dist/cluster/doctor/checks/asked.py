"""What the steps themselves answer: the run directory, its lock, what is in it, a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pocl_dist.cluster.doctor.case import Case
from pocl_dist.cluster.doctor.finding import Finding, ok, warning
from pocl_dist.config import Config


def asked(
    name: str,
    good: str,
    why: str,
    how: str,
    applies: Callable[[Config], bool] = lambda config: True,
) -> Callable[[Case], Iterator[Finding]]:
    """Returns the check that asks the probe `name`; `why` and `how` belong to its warnings.

    It finds nothing for a config to which it does not apply.
    """

    def check(case: Case) -> Iterator[Finding]:
        if not applies(case.config):
            return
        warnings = case.probes[name](case.config)
        for line in warnings:
            yield warning(line, why, how)
        if not warnings:
            yield ok(good)

    return check
