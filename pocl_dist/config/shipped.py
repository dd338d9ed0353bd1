"""Files that are no code and travel with the package: configs/ and launch/."""

from __future__ import annotations

from pathlib import Path

from pocl_dist.errors import MissingInputError

PACKAGE = Path(__file__).resolve().parents[1]


def launch_file(name: str) -> Path:
    """Returns a file of launch/, from the wheel or from the checkout."""
    inside = PACKAGE / "launch" / name
    return inside if inside.exists() else PACKAGE.parent / "launch" / name


def find_config(path: str) -> Path:
    """Returns the file itself, or the one of that name among the configs that the package ships."""
    if Path(path).is_file():
        return Path(path)
    shipped = Path(path).name
    for folder in (PACKAGE / "configs", PACKAGE.parent / "configs"):
        if Path(path).parent in (Path("configs"), Path(".")) and (folder / shipped).is_file():
            return folder / shipped
    raise MissingInputError(f"config file {path} does not exist (looked at {Path(path).resolve()})")
