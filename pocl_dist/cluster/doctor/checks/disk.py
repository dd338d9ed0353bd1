"""Free disk against what the run writes: checkpoints, export, cut student, teacher cache, rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pocl_dist.cluster.doctor.case import Case
from pocl_dist.cluster.doctor.finding import Finding, SkipError, error, ok, skipped, warning
from pocl_dist.data.row_streams import rows_file
from pocl_dist.files import free_bytes
from pocl_dist.models.header import ModelHeader

# fp32 weight and AdamW's two moments (distributed/checkpoint_share.py).
BYTES_PER_TRAINED_PARAMETER = 12
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blk|blocks|layer)\.(\d+)\.")


@dataclass(frozen=True)
class Disk:
    """What a run writes, in bytes."""

    checkpoint: int
    num_checkpoints: int
    export: int
    init_student: int
    cache: int
    is_cache_known: bool
    rows: int  # the training rows as they were read

    @property
    def total(self) -> int:
        """Returns all of it at the fullest moment: a new checkpoint before an old one goes."""
        checkpoints = (self.num_checkpoints + 1) * self.checkpoint
        return checkpoints + self.export + self.init_student + self.cache + self.rows


def student_parameters(case: Case) -> int:
    """Returns the student's parameters from file headers; SkipError without them."""
    model = case.model(case.trained_role)
    if not model.header.tensors:
        raise SkipError(f"the weights of {model.located.origin} are not downloaded yet")
    layers = case.config.models.student.init_layers
    if layers is None:
        return model.header.num_parameters
    return pruned_parameters(model.header, layers)


def pruned_parameters(header: ModelHeader, layers: list[int]) -> int:
    """Returns the parameters that are left when only `layers` of a model are kept."""
    kept = 0
    for tensor in header.tensors:
        found = _LAYER.search(tensor.name)
        if found is None or int(found[1]) in layers:
            kept += tensor.num_elements
    return kept


def needed_disk(case: Case) -> Disk:
    """Returns what the run will write."""
    config, parameters, cache = case.config, student_parameters(case), _cache_bytes(case)
    stages = config.curriculum.num_stages if config.checkpoint.keep_stage_ends else 0
    is_best = config.export.select == "best_dev"
    return Disk(
        checkpoint=0
        if config.models.student.lora is not None
        else BYTES_PER_TRAINED_PARAMETER * parameters,
        num_checkpoints=config.checkpoint.keep_last + stages + is_best,
        export=4 * parameters,
        init_student=0 if config.models.student.init_layers is None else 4 * parameters,
        cache=cache or 0,
        is_cache_known=cache is not None,
        rows=_rows_bytes(case),
    )


def _rows_bytes(case: Case) -> int:
    """Returns the size of the training rows, 0 for those of the hub and where there are none."""
    if "data.train" not in case.rows:  # another check has said why
        return 0
    file = rows_file(case.config.data.train, "data.train")
    return 0 if file is None else file.stat().st_size


def _cache_bytes(case: Case) -> int | None:
    """Returns the size of the teacher cache; None when rows, lengths or width are not known."""
    config = case.config
    if config.teacher.source == "online":
        return 0
    rows, lengths = case.rows.get("data.train"), case.lengths.get("data.train")
    width = case.model("teacher").header.hidden_size
    if rows is None or lengths is None or width is None or case.is_partial["data.train"]:
        return None
    per_token = 2 * width if config.teacher.source == "cache_hidden" else 8 * config.teacher.top_k
    return int(len(rows.examples) * lengths.mean_label_tokens * per_token)


def free_disk(case: Case) -> Iterator[Finding]:
    """Compares the run's files with what is free on the disk of the run directory."""
    needed, free = needed_disk(case), free_bytes(case.existing_parent)
    parts = {
        f"{needed.num_checkpoints + 1} checkpoints of {size(needed.checkpoint)}": needed.checkpoint,
        f"export {size(needed.export)}": needed.export,
        f"cut student {size(needed.init_student)}": needed.init_student,
        f"teacher cache about {size(needed.cache)}": needed.cache,
        f"training rows about {size(needed.rows)}": needed.rows,
    }
    line = (
        f"the run writes about {size(needed.total)} "
        f"({', '.join(text for text, num_bytes in parts.items() if num_bytes)}), "
        f"{size(free)} are free at {case.existing_parent}"
    )
    if free < needed.checkpoint + needed.init_student + needed.cache + needed.rows:
        yield error(74, line)
    elif free < needed.total:
        yield warning(
            line,
            "The run would start, and stop with 74 when the disk is full.",
            "make room, lower checkpoint.keep_last, or set run_dir to a larger disk",
        )
    else:
        yield ok(line)
    if not needed.is_cache_known:
        yield skipped("the size of the teacher cache needs all rows, their lengths and its width")
    if case.config.models.student.lora is not None:
        yield skipped("the size of a LoRA checkpoint depends on layers that only torch lists")


def size(num_bytes: float) -> str:
    """Returns bytes as a person reads them."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
