"""What computes a run: the format of its directory, this code, the packages below it."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pocl_dist import __version__
from pocl_dist.errors import MismatchError
from pocl_dist.files import JSONValue, digest_of, sha256_file

RUN_FORMAT = 2
"""Of the files of a run directory; another number is refused. 1 had no sealed `status.json`."""

_PACKAGES = ("torch", "transformers", "deepspeed", "ray", "safetensors", "tokenizers")


@cache
def versions() -> dict[str, JSONValue]:
    """Returns what computes a run: version and digest of this code, versions of its packages."""
    package = Path(__file__).resolve().parent
    files: dict[str, JSONValue] = {
        file.relative_to(package).as_posix(): sha256_file(file)
        for file in sorted(package.rglob("*.py"))
    }
    found: dict[str, JSONValue] = {"pocl_dist": __version__, "code sha256": digest_of(files)}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def check_same_versions(expected: Mapping[str, JSONValue]) -> None:
    """Raises MismatchError (78), naming this host, when it runs other code or packages."""
    found = versions()
    differing = [
        f"{name} is {found.get(name)}, not {expected[name]} as where the pass was started"
        for name in expected
        if found.get(name) != expected[name]
    ]
    if differing:
        raise MismatchError(f"host {socket.gethostname()}: {', '.join(differing)}")
