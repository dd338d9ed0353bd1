"""ENOSPC at every atomic write of a step in turn: 74, nothing half written, it goes on (T5)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pocl_dist.failpoints import VARIABLE
from tests.chaos.compare import fingerprint, verify_problem
from tests.chaos.lab import Lab
from tests.chaos.result import Result

MOST_WRITES = 20


def _plan(config: Path, entry: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **({VARIABLE: entry} if entry else {})}
    command = [sys.executable, "-m", "pocl_dist", "plan", str(config)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def _plan_digest(config: Path) -> str:
    return fingerprint(config.parent / "run").get("plan", "none")


def run(lab: Lab) -> Result:
    """Lets the N-th atomic write of `plan` meet a full disk, at its start or before its rename."""
    result = lab.result("ENOSPC at each atomic write of a step in turn, then once more")
    config = lab.training_config(lab.place("calm-plan"))
    assert _plan(config).returncode == 0
    expected = _plan_digest(config)
    for place in ("atomic_write.open", "atomic_write.before_rename"):
        for nth in range(1, MOST_WRITES + 1):
            config = lab.training_config(lab.place("enospc"))
            (config.parent / "run" / "plan.json").unlink()
            done = _plan(config, f"{place}=enospc@{nth}")
            if done.returncode == 0:  # all writes are through
                break
            said = done.stderr.strip()
            problem = "" if done.returncode == 74 else f"exit code {done.returncode}: {said[-300:]}"
            if "bytes free" not in said or "Traceback" in said:
                problem += f"; message: {said[-300:]}"
            half = [str(p) for p in (config.parent / "run").rglob(".tmp-*")]
            problem += f"; left: {half}" if half else ""
            again = _plan(config)
            problem += "" if again.returncode == 0 else f"; then {again.returncode}: {again.stderr}"
            problem += verify_problem(config.parent / "run")
            result.count(f"{place}, write {nth}: {problem}" if problem else "")
            result.compare([] if expected == _plan_digest(config) else ["plan"], place)
    return result
