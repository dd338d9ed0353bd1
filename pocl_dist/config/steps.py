"""Which steps a config needs, in order, and which of them are work of ranks; nothing is loaded."""

from __future__ import annotations

from pocl_dist.config.schema import Config


def needs_init_student(config: Config) -> bool:
    """Returns whether the student is to be made from the teacher."""
    return config.models.student.init_layers is not None


def needs_generate(config: Config) -> bool:
    """Returns whether the run trains on the teacher's answers."""
    return config.data.responses == "teacher"


def needs_difficulty(config: Config) -> bool:
    """Returns whether the order of rows matters: not with one stage, nor when they are shuffled."""
    return config.curriculum.num_stages > 1 and config.curriculum.ordering != "shuffled"


def steps_of(config: Config) -> list[str]:
    """Returns the names of the steps that `run` does, as the commands are called."""
    needed = {
        "init-student": needs_init_student(config),
        "generate": needs_generate(config),
        "measure": needs_difficulty(config),
        "plan": True,
        "cache": config.teacher.source != "online",
        "distill": True,
        "evaluate": bool(config.data.eval or config.evaluate.harness),
        "report": True,
    }
    return [name for name, is_needed in needed.items() if is_needed]


def is_ranks_work(step: str, config: Config) -> bool:
    """Returns whether a launcher starts the step as ranks; the others are one process (and Ray)."""
    return step == "distill" or (step == "cache" and config.teacher.cache_engine == "zero3")


def is_actors_work(step: str, config: Config) -> bool:
    """Returns whether Ray actors do the step, on as many machines as there are."""
    return step in ("generate", "measure", "cache", "evaluate") and not is_ranks_work(step, config)
