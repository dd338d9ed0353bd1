"""`pocl-dist launch`: job files from the config, printed, written or submitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from pocl_dist.cluster.launch_plan import LaunchPlan, make_plan
from pocl_dist.cluster.targets import TARGETS
from pocl_dist.errors import UsageError
from pocl_dist.files import atomic_write_text, new_folder


class Target(Protocol):
    """What a file in targets/ has."""

    def render(self, plan: LaunchPlan) -> dict[str, str]:
        """Returns {file name: text}; looks at nothing but the plan."""

    def submit(self, plan: LaunchPlan, folder: Path) -> str:
        """Submits what `render` gave and `folder` holds; returns the job id(s)."""


def find_target(name: str) -> Target:
    """Returns the target of that name; UsageError (2) for an unknown one."""
    if name not in TARGETS:
        raise UsageError(f"--target {name}: unknown; one of {', '.join(sorted(TARGETS))}")
    return cast("Target", import_module(f"pocl_dist.cluster.targets.{name}"))


def launch(target: str, words: Sequence[str], render: Path | None, is_dry_run: bool) -> None:
    """Prints the job files (`is_dry_run`), writes them to `render`, or submits them.

    The first two look at no path and no data that the config names: the cluster may be elsewhere.
    """
    chosen = find_target(target)
    if is_dry_run and render is not None:
        raise UsageError("--dry-run writes nothing and --render writes: give one of them")
    plan = make_plan(words, None if render is None else str(render))
    files = chosen.render(plan)
    if is_dry_run:
        for name, text in files.items():
            print(f"# ── {plan.path(name)}\n{text.rstrip()}\n", flush=True)
        return
    folder = Path(plan.folder)
    write_files(folder, files)
    if render is not None:
        print(f"launch: {len(files)} files in {folder}, nothing submitted", flush=True)
        return
    print(chosen.submit(plan, folder), flush=True)


def write_files(folder: Path, files: Mapping[str, str]) -> None:
    """Writes the files of a job; the folder is there whole or not at all.

    A job that runs reads the files it was started with: existing ones are replaced one by one,
    each whole, and files of another target are left alone.
    """
    if folder.exists():
        for name, text in files.items():
            atomic_write_text(folder / name, text)
        return
    with new_folder(folder) as temporary:
        for name, text in files.items():
            atomic_write_text(temporary / name, text)
