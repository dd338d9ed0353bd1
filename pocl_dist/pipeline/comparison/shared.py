"""What all arms share, made once in RUN/shared and linked into every run that it belongs to.

The student before training scores the rows, the teacher answers the prompts (SeqKD) and fills the
cache (`teacher.source: cache_*`) once. A run gets hard links of the finished files and their
records; its own steps then check them, as they check what they find on any resume, and refuse (78)
what was made from other inputs. `verify` follows the chain of each run as if it had made them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from pocl_dist.config import Config, replaced
from pocl_dist.config.steps import needs_difficulty, needs_generate, needs_init_student
from pocl_dist.display.output import say
from pocl_dist.files import new_folder
from pocl_dist.pipeline.cache_inputs import plan_temperatures
from pocl_dist.pipeline.comparison.arms import RowCounts
from pocl_dist.pipeline.comparison.children import run_alone
from pocl_dist.pipeline.comparison.folders import ComparedRun
from pocl_dist.pipeline.comparison.inner import do_steps
from pocl_dist.pipeline.comparison.visits import stages_of
from pocl_dist.pipeline.difficulty_files import read_quarantine
from pocl_dist.pipeline.generate import generate
from pocl_dist.pipeline.generated_files import output_file
from pocl_dist.pipeline.init_student import init_student
from pocl_dist.pipeline.inputs import read_prompts, read_train
from pocl_dist.pipeline.measure import measure
from pocl_dist.pipeline.plan import make_plan
from pocl_dist.pipeline.plan_files import read_plan
from pocl_dist.pipeline.probes import resumed_results
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.pipeline.run_lock import run_lock
from pocl_dist.pipeline.run_step import Step
from pocl_dist.pipeline.stop_request import StopRequest
from pocl_dist.records import Plan


def shared_config(base: Config) -> Config:
    """Returns the config of RUN/shared: the user's, with its curriculum, without test sets."""
    return replaced(base, {"run_dir": str(Path(base.run_dir) / "shared"), "data.eval": []})


def is_cached(base: Config) -> bool:
    """Returns whether arms may read the teacher from a cache."""
    return base.teacher.source != "online"


def make_shared(base: Config, run: RunDirectory, stop: StopRequest) -> None:
    """Does the shared steps, in one Ray session. `run` and `stop` are the comparison's.

    Raises MismatchError (78) when what is there was made from another config or other rows.
    """
    config = shared_config(base)
    shared = RunDirectory(Path(config.run_dir))
    resumed_results(config)
    if _is_made(config, shared):
        say("── shared by all arms: it is there")
        make_plan(config, shared)  # compares, and shows, what is there
    else:
        from pocl_dist.pipeline.actor_pass import actors_of  # torch: not before it is needed

        say("── shared by all arms: scores of the student before training, the teacher's answers")
        with actors_of(config, run) as waiting:
            waiting.install()  # `ray.init` has put handlers of its own in place, which abort
            do_steps(config, _steps(config))
    if is_cached(base) and not (shared.teacher_cache / "summary.json").exists():
        # A process of its own: under zero3 its ranks need the devices that Ray holds.
        run_alone("cache", config, shared.root.with_name("shared.yaml"), stop)


def _steps(config: Config) -> list[tuple[str, Step]]:
    steps: list[tuple[str, Step]] = [
        ("generate", generate),
        ("measure", measure),
        ("plan", make_plan),
    ]
    if needs_init_student(config):
        steps.insert(0, ("init-student", init_student))
    return steps


def _is_made(config: Config, shared: RunDirectory) -> bool:
    files = [shared.difficulty / "summary.json", shared.plan, output_file(config)]
    return all(file.exists() for file in files)


def count_rows(base: Config) -> RowCounts:
    """Returns how many rows the arms have, from the shared steps' files."""
    config = shared_config(base)
    shared = RunDirectory(Path(config.run_dir))
    references = len(read_prompts(config).examples)
    generated = len(read_train(replaced(config, {"data.responses": "teacher"})).examples)
    trained_on = generated if needs_generate(config) else references
    ranked = trained_on - len(read_quarantine(shared.difficulty))
    return RowCounts(references, generated, ranked if needs_difficulty(config) else trained_on)


def link_shared(base: Config, compared: ComparedRun, counts: RowCounts) -> None:
    """Gives a run hard links of the shared results that its config needs and that it lacks."""
    shared = RunDirectory(Path(shared_config(base).run_dir))
    config, run = compared.config, compared.run
    folders = [
        (shared.init_student, needs_init_student(config)),
        (shared.generated, needs_generate(config)),
        (shared.difficulty, needs_difficulty(config)),
        (shared.teacher_cache, _shares_cache(base, config, counts)),
    ]
    wanted = [folder for folder, is_needed in folders if is_needed and folder.exists()]
    missing = [folder for folder in wanted if not (run.root / folder.name).exists()]
    models = shared.root / "models.json"
    has_models = (run.root / models.name).exists() or not models.exists()
    if has_models and not missing:
        return
    with run_lock(run.root):
        if not has_models:  # hub ids: all runs keep the commits that were found first
            _link(models, run.root / models.name)
        for folder in missing:
            _link_folder(folder, run.root / folder.name)


def _shares_cache(base: Config, config: Config, counts: RowCounts) -> bool:
    """Returns whether the shared cache is one that the run's own `cache` step would make.

    Top-k is cut for the temperatures of a plan; rows without scores are not in the shared one.
    """
    if config.teacher.source != base.teacher.source or not is_cached(config):
        return False
    if counts.of(config) != counts.ranked:
        return False
    if config.teacher.source == "cache_hidden":
        return True
    stages = stages_of(config, counts.ranked)
    shared = read_plan(RunDirectory(Path(shared_config(base).run_dir)).plan)
    return plan_temperatures(Plan((), stages)) == plan_temperatures(shared)


def _link_folder(source: Path, target: Path) -> None:
    """Makes `target`, whole or not at all, of links to the finished files of `source`."""
    with new_folder(target) as temporary:
        for file in _finished(source):
            place = temporary / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            _link(file, place)


def _finished(folder: Path) -> Sequence[Path]:
    # The ranking is plan's, not measure's: every run writes its own.
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".tmp-") and path.name != "ranking.parquet"
    ]


def _link(source: Path, target: Path) -> None:
    """Links a file; copies it where the file system has no hard links. No writer changes either.

    Every writer of the project replaces files by renaming, so a link is as good as a copy.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
