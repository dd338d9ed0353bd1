"""Ray: can it be reached, and would it let in whoever reaches its ports."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pocl_dist.cluster.doctor.case import Case
from pocl_dist.cluster.doctor.finding import Finding, ok, warning
from pocl_dist.config import Config
from pocl_dist.config.steps import steps_of
from pocl_dist.distributed.ray_reachable import check_reachable
from pocl_dist.distributed.ray_session import check_token_mode

LONGEST_WAIT_SECONDS = 30.0


def ray_steps(config: Config) -> list[str]:
    """Returns the steps of the run that start Ray actors."""
    names = {"generate", "measure", "evaluate"}
    if config.teacher.cache_engine == "ray":
        names.add("cache")
    return [step for step in steps_of(config) if step in names]


def ray(case: Case) -> Iterator[Finding]:
    """Looks at the token settings, and knocks at an existing cluster with and without a token."""
    steps = ray_steps(case.config)
    if not steps:
        yield ok("no step of this run needs Ray")
        return
    check_token_mode()
    address = case.config.ray.address
    if address is None:
        yield ok(f"a local Ray is started for {', '.join(steps)}: with token, without dashboard")
        return
    yield from _token_file()
    timeout = min(case.config.ray.start_timeout_seconds, LONGEST_WAIT_SECONDS)
    check_reachable(address, timeout)
    yield ok(f"Ray at {address} answers, and refuses whoever has no token")


def _token_file() -> Iterator[Finding]:
    """A token file that others can read; what is in it is not shown."""
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(given) if given else Path.home() / ".ray" / "auth_token"
    if file.exists() and file.stat().st_mode & 0o077:
        yield warning(
            f"{file} can be read by others (mode {file.stat().st_mode & 0o777:o})",
            "Who has the token can run code on the cluster (Ray writes it with mode 644).",
            f"chmod 600 {file}",
        )
