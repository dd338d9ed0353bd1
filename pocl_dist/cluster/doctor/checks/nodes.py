"""Nodes of a job: do all see the run directory's folder, do their clocks and packages agree.

Every node writes a file beside the run directory and waits for those of the others: what they are
compared by is what the run will share. No network is used.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import cast

from pocl_dist.cluster.doctor.case import Case
from pocl_dist.cluster.doctor.checks.software import MAIN_PACKAGES
from pocl_dist.cluster.doctor.finding import (
    SEE_ABOVE,
    Finding,
    SkipError,
    error,
    ok,
    warning,
)
from pocl_dist.files import WriteError, atomic_write_json, read_json, writing

POLL_SECONDS = 0.2
FAREWELL_SECONDS = 10.0
MOST_SKEW_SECONDS = 2.0


@dataclass(frozen=True)
class NodeOfJob:
    """This node among those on which a launcher started doctor."""

    job: str  # the same on all nodes, another one for each start
    index: int
    count: int
    is_first_here: bool  # one process of each node speaks for it


def node_of_job() -> NodeOfJob | None:
    """Returns this node's place from the variables of srun or torchrun; None outside of both."""
    given = os.environ
    try:
        if "SLURM_STEP_NUM_NODES" in given:
            job = f"slurm-{given.get('SLURM_JOB_ID')}-{given.get('SLURM_STEP_ID')}"
            count, index = int(given["SLURM_STEP_NUM_NODES"]), int(given["SLURM_NODEID"])
            return NodeOfJob(job, index, count, given.get("SLURM_LOCALID", "0") == "0")
        if "GROUP_RANK" in given and "LOCAL_WORLD_SIZE" in given:
            count = int(given["WORLD_SIZE"]) // int(given["LOCAL_WORLD_SIZE"])
            names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
            job = "-".join(given.get(name, "") for name in names)
            index = int(given["GROUP_RANK"])
            return NodeOfJob(job, index, count, given.get("LOCAL_RANK", "0") == "0")
    except (KeyError, ValueError, ZeroDivisionError):
        return None  # `launcher variables` says what is wrong with them
    return None


def is_main_process() -> bool:
    """Returns whether this process prints for the whole job."""
    node = node_of_job()
    if node is not None:
        return node.index == 0 and node.is_first_here
    return os.environ.get("RANK", "0") == "0"


def server_clock(case: Case) -> Iterator[Finding]:
    """Compares this machine's clock with that of the file server, by the time of a new file."""
    try:
        skew = _skew_seconds(case.existing_parent)
    except WriteError:
        raise SkipError(f"the run directory cannot be written {SEE_ABOVE}") from None
    if abs(skew) > MOST_SKEW_SECONDS:
        yield warning(
            f"the clock of {socket.gethostname()} and that of the file server differ by "
            f"{abs(skew):.1f} s",
            "Times in logs do not compare. (Leases and checkpoints go by the server's clock.)",
            "let NTP or chrony set the clocks",
        )
    else:
        yield ok(f"this clock and the file server's agree to {abs(skew):.2f} s")


def _skew_seconds(folder: Path) -> float:
    probe = folder / f".tmp-doctor-clock-{socket.gethostname()}-{os.getpid()}"
    with writing(folder):
        try:
            probe.touch()
            return time.time() - probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)


def other_nodes(case: Case) -> Iterator[Finding]:
    """Meets the other nodes of the job in the folder of the run directory."""
    node = node_of_job()
    if node is None or node.count < 2:
        raise SkipError(
            "doctor was started on one node",
            "in a job: srun --nodes N --ntasks-per-node=1 pocl-dist doctor CONFIG, or torchrun",
        )
    if not node.is_first_here:
        return
    name = hashlib.sha256(f"{node.job} {case.config.run_dir}".encode()).hexdigest()[:16]
    folder = case.existing_parent / f".tmp-doctor-job-{name}"
    mine = {
        "host": socket.gethostname(),
        "skew_seconds": _skew_seconds(case.existing_parent),
        "versions": {package: _version(package) for package in MAIN_PACKAGES},
    }
    atomic_write_json(folder / f"node-{node.index}.json", mine)
    try:
        told = _wait_for_all(folder, "node", node.count, case.options.wait_seconds)
        yield from _compared(case, node, told)
        atomic_write_json(folder / f"seen-{node.index}.json", {})
        if node.index == 0 and len(told) == node.count:
            _wait_for_all(folder, "seen", node.count, FAREWELL_SECONDS)
    finally:
        if node.index == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _wait_for_all(
    folder: Path, kind: str, count: int, seconds: float
) -> dict[int, dict[str, object]]:
    """Returns what each node has written, when all have or the time is over."""
    ends = time.monotonic() + seconds
    while True:
        files = {index: folder / f"{kind}-{index}.json" for index in range(count)}
        there = [index for index, file in files.items() if file.exists()]
        if len(there) == count or time.monotonic() > ends:
            return {index: dict(read_json(files[index])) for index in there}
        os.listdir(folder)  # makes a network file system look again
        time.sleep(POLL_SECONDS)


def _compared(case: Case, node: NodeOfJob, told: dict[int, dict[str, object]]) -> Iterator[Finding]:
    hosts = [str(told[index]["host"]) for index in sorted(told)]
    if len(told) < node.count:
        missing = [str(index) for index in range(node.count) if index not in told]
        yield error(
            69,
            f"{case.existing_parent}: {len(told)} of {node.count} nodes were seen there within "
            f"{case.options.wait_seconds:g} s ({', '.join(hosts)}); node {', '.join(missing)} "
            "was not",
        )
        return
    yield ok(f"all {node.count} nodes see {case.existing_parent}: {', '.join(hosts)}")
    skews = {str(row["host"]): float(cast("float", row["skew_seconds"])) for row in told.values()}
    spread = max(skews.values()) - min(skews.values())
    if spread > MOST_SKEW_SECONDS:
        late, early = min(skews, key=skews.__getitem__), max(skews, key=skews.__getitem__)
        yield warning(
            f"clocks differ by {spread:.1f} s ({late} is behind {early})",
            "Times in logs do not compare, and munge or Kerberos refuse larger differences.",
            "let NTP or chrony set the clocks",
        )
    yield from _same_versions(told)


def _same_versions(told: dict[int, dict[str, object]]) -> Iterator[Finding]:
    first = cast("dict[str, str]", told[0]["versions"])
    for index in sorted(told)[1:]:
        other = cast("dict[str, str]", told[index]["versions"])
        differing = [
            f"{package} {first[package]} and {other.get(package)}"
            for package in first
            if first[package] != other.get(package)
        ]
        if differing:
            yield error(
                71,
                f"{told[0]['host']} and {told[index]['host']} have other packages: "
                f"{', '.join(differing)}",
                "Ranks with other code compute other numbers, or wait for each other for ever.",
                "use one environment or image on all nodes",
            )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
