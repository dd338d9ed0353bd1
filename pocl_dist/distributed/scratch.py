"""The folder on each node's own disk (`run.scratch_dir`): compile caches and copies."""

from __future__ import annotations

import os
from pathlib import Path

from pocl_dist.errors import ConfigError
from pocl_dist.files import writing

# What compilers read when they first work. On a shared file system all nodes would wait for one
# lock, and a home of ten thousand small files would be slow to load.
COMPILE_CACHES = {
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
    "TRITON_CACHE_DIR": "triton",
}


def scratch_folder(scratch_dir: str) -> Path:
    """Returns this user's folder below `run.scratch_dir`: other users' may lie beside it."""
    return Path(scratch_dir) / f"pocl_dist-{os.getuid()}"


def use_scratch(scratch_dir: str | None, run_dir: Path) -> None:
    """Sends compile caches of this process and its children to the scratch folder of this node.

    A variable that is set already stays. Raises ConfigError (64) for a folder in the run directory,
    WriteError (74) for one that cannot be made.
    """
    if scratch_dir is None:
        return
    folder = scratch_folder(scratch_dir)
    if folder.resolve().is_relative_to(run_dir.resolve()):
        raise ConfigError(
            f"run.scratch_dir: {scratch_dir} lies in run_dir ({run_dir}); it is to be a disk of "
            "each node"
        )
    with writing(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for variable, name in COMPILE_CACHES.items():
        os.environ.setdefault(variable, str(folder.resolve() / name))
