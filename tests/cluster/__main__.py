"""Runs the cluster tests, each a process of its own; installs the Debian packages they need.

python -m tests.cluster [NAME ...]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from importlib import import_module

SKIPPED = 77
"""A script's exit code when this machine cannot do what it tries; it has said why."""

# A module here has PACKAGES (Debian) and main() -> exit code, and runs alone too: python -m.
TESTS = {
    "deepspeed": "deepspeed_hosts",
    "kubernetes": "kubernetes_pods",
    "ray": "ray_hosts",
    "slurm": "slurm_chain",
}


def install(packages: set[str]) -> None:
    """Installs what is missing, as root on Debian; elsewhere the tests say what they lack."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    asked = ["dpkg-query", "-W", "-f", "${Package} ${Status}\n", *sorted(packages)]
    told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    there = {line.split()[0] for line in told.splitlines() if line.endswith(" installed")}
    missing = sorted(packages - there)
    if not missing:
        return
    print(f"cluster-test: installing {' '.join(missing)}", flush=True)
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "-qq"], env=quiet, check=True)
    line = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *missing]
    subprocess.run(line, env=quiet, check=True, stdout=subprocess.DEVNULL)


def main() -> int:
    """Returns 0 when all that could be tried ended as promised, else 1."""
    names = sys.argv[1:] or list(TESTS)
    if unknown := [name for name in names if name not in TESTS]:
        print(f"cluster-test: {', '.join(unknown)}: unknown; one of {', '.join(TESTS)}")
        return 2
    modules = {name: f"tests.cluster.{TESTS[name]}" for name in names}
    install({p for module in modules.values() for p in import_module(module).PACKAGES})
    verdicts = []
    for name, module in modules.items():
        print(f"── {name}", flush=True)
        started = time.monotonic()
        code = subprocess.run([sys.executable, "-m", module], check=False).returncode
        verdict = {0: "ok", SKIPPED: "SKIPPED"}.get(code, f"FAILED ({code})")
        verdicts.append(f"{verdict:10s} {name}, {time.monotonic() - started:.0f} s")
    print("\n".join(["── cluster-test", *verdicts]), flush=True)
    return 1 if any(line.startswith("FAILED") for line in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
