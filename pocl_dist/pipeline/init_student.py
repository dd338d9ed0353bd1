"""init-student: makes the student that the config cuts from the teacher."""

from __future__ import annotations

from pocl_dist.config import Config
from pocl_dist.display.output import say
from pocl_dist.errors import ConfigError
from pocl_dist.files import JSONValue, atomic_write_json, new_folder
from pocl_dist.models.sources import MARKER, model_digest
from pocl_dist.pipeline.inputs import teacher_source
from pocl_dist.pipeline.run_directory import RunDirectory, check_made_from


def init_student(config: Config, run: RunDirectory) -> None:
    """Writes `init_student/` (safetensors, tokenizer); does nothing when it is there already."""
    teacher = teacher_source(config, run)
    layers = config.models.student.init_layers
    if teacher is None or layers is None:
        raise ConfigError(
            "models.student.init_layers: names the teacher layers to keep; it is not set"
        )
    made_from: dict[str, JSONValue] = {
        "models.student.init_layers": list(layers),
        "digest.teacher": model_digest(teacher),
    }
    if check_made_from(run.init_student / MARKER, made_from):
        say(f"init-student: {run.init_student} is there")
        return
    from pocl_dist.models.pruning import write_pruned_student  # torch: not before it is needed

    with new_folder(run.init_student) as temporary:
        write_pruned_student(teacher, layers, temporary)
        atomic_write_json(temporary / MARKER, made_from)
    say(f"init-student: kept {len(layers)} layers of {teacher.origin} in {run.init_student}")
