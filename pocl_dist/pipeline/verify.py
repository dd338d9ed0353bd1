"""verify: every file of a run directory against its sealed list, and every link of the chain.

Reads all bytes once; loads no torch. Nothing is followed that leaves the folder.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from pocl_dist.errors import MismatchError, MissingInputError
from pocl_dist.files import sha256_file
from pocl_dist.pipeline.comparison.nested import nested_findings
from pocl_dist.pipeline.manifest import (
    MANIFEST_NAME,
    NESTED,
    SEAL_NAME,
    is_temporary,
    is_unsealed,
    read_rows,
    seal_text,
    walk,
)
from pocl_dist.pipeline.run_lock import is_locked
from pocl_dist.pipeline.status_file import read_status
from pocl_dist.pipeline.verify_chain import chain_findings


@dataclass
class Contents:
    """What lies in a run directory: the hash of each file, and what can be no part of it."""

    sha256: dict[str, str] = field(default_factory=dict)
    num_bytes: dict[str, int] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)


def _read_contents(root: Path) -> Contents:
    contents = Contents()

    def note(error: OSError) -> None:
        contents.findings.append(f"{error.filename}: cannot be read: {error.strerror}")

    for name, found in walk(root, note):
        if name.split("/")[0] in NESTED:
            continue  # `nested_findings` looks there
        if stat.S_ISLNK(found.st_mode):
            target = (root / name).resolve()
            leaves = "" if target.is_relative_to(root.resolve()) else " that leaves the folder"
            contents.findings.append(f"{name}: a symbolic link{leaves}; it was not followed")
        elif not stat.S_ISREG(found.st_mode):
            contents.findings.append(f"{name}: is neither a file nor a folder")
        else:
            try:
                contents.sha256[name] = sha256_file(root / name)
                contents.num_bytes[name] = found.st_size
            except FileNotFoundError:  # vanished; if it is listed, it is missing
                continue
            except OSError as error:
                contents.findings.append(f"{name}: cannot be read: {error.strerror}")
    return contents


def _live_findings(root: Path, names: list[str]) -> list[str]:
    """Returns what only a run that lives, or was killed, has."""
    findings = []
    for name in names:
        if name == "lock":
            state = "a run is at work here" if is_locked(root) else "left by a run that was killed"
            findings.append(f"lock: {state}")
        elif name.startswith("control/"):
            findings.append(f"{name}: a request, or left by a run that failed")
        elif is_temporary(name):
            findings.append(f"{name}: left half written by a run that was killed")
    return findings


def _seal_findings(root: Path) -> list[str]:
    missing = [name for name in (MANIFEST_NAME, SEAL_NAME) if not (root / name).is_file()]
    if missing:
        return [f"{name}: missing" for name in missing]
    seal, expected = (root / SEAL_NAME).read_bytes(), seal_text(root).encode()
    if seal == expected:
        return []
    digest, rest = seal[:64], seal[64:]
    if len(seal) != len(expected) or rest != expected[64:] or not _is_hex(digest):
        return [f"{SEAL_NAME}: is no seal of {MANIFEST_NAME}"]
    return [f"{MANIFEST_NAME}: does not match {SEAL_NAME}: one of the two was changed"]


def _is_hex(digest: bytes) -> bool:
    return all(byte in b"0123456789abcdef" for byte in digest)


def _listed_findings(root: Path, contents: Contents) -> list[str]:
    """Compares what is there with the list, which may be damaged or hostile itself."""
    if not (root / MANIFEST_NAME).is_file():
        return []
    try:
        rows = read_rows(root)
    except MismatchError:
        return [f"{MANIFEST_NAME}: is no manifest"]
    findings = []
    for name, row in rows.items():
        if name in contents.sha256:
            num_bytes = contents.num_bytes[name]
            if contents.sha256[name] == row["sha256"]:
                continue
            if num_bytes != row.get("bytes"):
                findings.append(f"{name}: {num_bytes} bytes, expected {row.get('bytes')}")
            else:
                findings.append(f"{name}: content changed (sha256 differs)")
        elif name.startswith("/") or ".." in name.split("/"):
            findings.append(f"{name!r}: leaves {root}; it was not looked at")
        else:
            is_other = os.path.lexists(root / name)
            findings.append(f"{name}: {'is no readable file' if is_other else 'missing'}")
    for name in sorted(set(contents.sha256) - set(rows)):
        if not is_unsealed(name) and not is_temporary(name):
            findings.append(f"{name}: not listed in {MANIFEST_NAME}")
    return findings


def find_changes(root: Path) -> list[str]:
    """Returns one line per finding, each naming its file; empty when all is as it was written."""
    contents = _read_contents(root)
    findings = [*contents.findings, *_live_findings(root, list(contents.sha256))]
    try:
        read_status(root / "status.json")
    except MissingInputError:
        findings.append("status.json: missing")
    except MismatchError as error:
        findings.append(str(error).replace(str(root / "status.json"), "status.json"))
    try:
        findings += [*_seal_findings(root), *_listed_findings(root, contents)]
    except OSError as error:
        findings.append(f"{error.filename}: cannot be read: {error.strerror}")
    findings += [*chain_findings(root, contents.sha256), *nested_findings(root, find_changes)]
    return list(dict.fromkeys(findings))


def verify(root: Path) -> None:
    """Prints that all is well; else raises MismatchError (78) with every finding.

    MissingInputError (66) when there is no such folder.
    """
    if not root.is_dir():
        raise MissingInputError(f"{root} is no run directory")
    findings = find_changes(root)
    if findings:
        raise MismatchError("\n".join([f"{root}: {len(findings)} finding(s)", *findings]))
    print(f"{root}: every file is as its manifest says, and each was made from the one before")
