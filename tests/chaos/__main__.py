"""Runs experiments and prints their table; when all were run, into docs/reliability.md too."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.chaos.experiments import EXPERIMENTS
from tests.chaos.jobs import end_all
from tests.chaos.lab import Lab
from tests.chaos.result import Result, table, write_table


def _run(name: str, lab: Lab) -> Result:
    started = time.monotonic()
    try:
        result = EXPERIMENTS[name](lab)
    except Exception as error:  # an experiment that breaks is one that failed, the others go on
        traceback.print_exc()
        result = Result("broke off", lab.seed, failures=[f"{type(error).__name__}: {error}"[:300]])
    finally:
        end_all()
    result.seconds = time.monotonic() - started
    return result


def main() -> int:
    """Returns 0 when every experiment ended as promised, else 1."""
    names = sys.argv[1:] or list(EXPERIMENTS)
    scale, seed = (
        float(os.environ.get("CHAOS_SCALE", "1")),
        int(os.environ.get("CHAOS_SEED", "42")),
    )
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that jobs are ended, see `_run`
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"chaos: seed {seed}, scale {scale:g}, in {folder}", flush=True)
    lab, results = Lab(folder, seed, scale), dict[str, Result]()
    for name in names:
        results[name] = result = _run(name, lab)
        verdict = "ok" if result.is_good else "FAILED"
        print(
            f"{verdict:6s} {name}: {result.num_survived} of {result.num_faults} survived, "
            f"{result.num_identical} of {result.num_compared} ends identical, "
            f"worst {result.worst_seconds or 0:.1f} s, took {result.seconds:.0f} s",
            flush=True,
        )
        for line in result.failures:
            print(f"       {line}", flush=True)
    command = "make chaos" if scale == 1 else f"CHAOS_SCALE={scale:g} make chaos"
    text = table(results, command)
    print(text)
    if not sys.argv[1:]:
        write_table(text)
    is_good = all(result.is_good for result in results.values())
    if is_good:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"chaos: FAILED; run directories and logs are kept in {folder}", flush=True)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
