"""What comes from files of others: names that stay in their folder, text that may be shown.

What a user types, in a config or on a command line, may point anywhere. A name that stands *in* a
file (manifest, plan, model folder) may not, and no text from a file reaches a terminal as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType

from pocl_dist.errors import RefusedError

LONGEST_NAME = 255
LONGEST_VALUE = 80
LONGEST_LINE = 2000
# Older ones have known holes: docs/security/known_bad.json, which a test compares with this.
MINIMUM_VERSIONS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {"torch": (2, 10, 0), "deepspeed": (0, 15, 1), "ray": (2, 54, 0)}
)


def inside(folder: Path, name: str, what: str = "") -> Path:
    """Returns the path of `name`, which a file gave, in `folder`.

    Raises RefusedError (77) when it is absolute, has `..` or control characters in it, is longer
    than a file system takes, or is a link that leaves the folder. `what` says who gave it.
    """
    parts = Path(name).parts
    is_plain = name.isprintable() and bool(parts) and max(map(len, parts)) <= LONGEST_NAME
    path = folder / name
    if (
        not is_plain
        or Path(name).is_absolute()
        or ".." in parts
        or not path.resolve().is_relative_to(folder.resolve())
    ):
        raise RefusedError(f"{what or folder}: the name {shown(name)} in it leaves {folder}")
    return path


def printable(text: str) -> str:
    """Returns text for a terminal or a log: control characters escaped, lines of bounded length.

    A hostile row, path or model config could otherwise move the cursor, hide lines or forge some.
    """
    lines = []
    for line in text.split("\n"):
        clean = "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)
        lines.append(clean if len(clean) <= LONGEST_LINE else f"{clean[:LONGEST_LINE]}...")
    return "\n".join(lines)


def shown(value: object) -> str:
    """Returns a value for a message: on one line, escaped, 80 characters at most."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def check_versions() -> None:
    """Raises RefusedError (77) when torch, deepspeed or ray has a known hole. Imports none of them.

    pip holds the bounds of setup.py when it installs; an image put together by hand may not.
    """
    for problem in outdated_packages():
        raise RefusedError(problem)


def outdated_packages() -> Iterator[str]:
    """Yields a line for each installed package that `check_versions` refuses."""
    for name, minimum in MINIMUM_VERSIONS.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            continue  # the step that needs it says so
        numbers = re.match(r"\d+(?:\.\d+)*", found)
        if numbers is None or tuple(map(int, numbers[0].split("."))) < minimum:
            wanted = ".".join(map(str, minimum))
            hint = f"install {name} >= {wanted} (SECURITY.md)"
            yield f"{name} {found} has known security holes; {hint}"
