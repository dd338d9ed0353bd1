"""Runs the blocks of the documentation that are marked `<!-- run: tiny -->`: `make docs-check`.

The blocks of a page run one after the other in one empty folder, on the CPU, as a reader would.
NAMES of pages (`quickstart data`) run those alone. Exits with 1 when a block fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.docs_blocks import REPOSITORY, Block, command_blocks

TIMEOUT_SECONDS = 900


def run_block(block: Block, folder: Path) -> bool:
    """Runs a block in a shell that ends at the first failure; returns whether all went well."""
    here = Path(sys.executable).parent
    path = os.pathsep.join([str(here), os.environ.get("PATH", "")])
    environment = os.environ | {"PATH": path, "CUDA_VISIBLE_DEVICES": "", "TERM": "dumb"}
    environment["PYTHONPATH"] = str(REPOSITORY)
    start = time.monotonic()
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=TIMEOUT_SECONDS,
    )
    word = "ok" if done.returncode == 0 else f"FAILED ({done.returncode})"
    print(f"{block}: {word}, {time.monotonic() - start:.0f} s", flush=True)
    if done.returncode:
        print(done.stdout[-4000:], flush=True)
    return done.returncode == 0


def main(names: list[str]) -> int:
    """Runs the blocks page by page; returns the exit code."""
    blocks = [block for block in command_blocks() if block.kind == "run"]
    wanted = [block for block in blocks if not names or block.page.stem in names]
    failed = 0
    for page in dict.fromkeys(block.page for block in wanted):
        with tempfile.TemporaryDirectory(prefix="pocl-docs-") as folder:
            for block in wanted:
                if block.page == page:
                    failed += not run_block(block, Path(folder))
    print(f"{len(wanted)} blocks of commands run, {failed} failed")
    return 1 if failed or not wanted else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
