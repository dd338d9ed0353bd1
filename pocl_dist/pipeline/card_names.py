"""What a model card may name, and the YAML at its head that the hub reads."""

from __future__ import annotations

from pathlib import Path, PurePath

from pocl_dist.config import Config

FILE = "README.md"


def public_name(path: str) -> str:
    """Returns a hub id or package as it is; of a local path the last part only."""
    is_public = path.startswith("package:") or is_hub_id(path)
    return path if is_public else PurePath(path).name


def is_hub_id(path: str) -> bool:
    """Returns whether a path of a config is a hub id: nothing of that name lies here."""
    owner, _, name = path.partition("@")[0].partition("#")[0].partition("/")
    is_plain = bool(owner and name) and "/" not in name and not owner.startswith((".", "~"))
    return is_plain and not Path(path).exists() and not name.endswith((".jsonl", ".parquet"))


def _license(folder: Path) -> str | None:
    """Returns the licence that the card of the student before training names, if it has one."""
    from huggingface_hub.repocard import metadata_load

    card = folder / FILE
    found = metadata_load(card) if card.is_file() else None
    value = (found or {}).get("license")
    return value if isinstance(value, str) else None


def front_matter(config: Config, student_folder: Path) -> str:
    """Returns the YAML that the hub reads, between its `---` lines."""
    from huggingface_hub import ModelCardData

    teacher, student = config.models.teacher, config.models.student
    paths = [student.path or (teacher and teacher.path) or ""]
    data = ModelCardData(
        base_model=paths[0] if is_hub_id(paths[0]) else None,
        datasets=[config.data.train.partition("@")[0].partition("#")[0]]
        if is_hub_id(config.data.train)
        else None,
        library_name="transformers",
        license=_license(student_folder),
        pipeline_tag="text-generation",
        tags=["distillation", "pocl"] if teacher is not None else ["sft"],
    )
    return f"---\n{data.to_yaml()}\n---\n"
