"""Which runs are trained and answered next: the grid with the first seed, then seed by seed.

So a comparison that is stopped has all methods with the seeds that were reached. Every training is
tried once per attempt; one that diverged (76) is a result and not tried again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pocl_dist.config import Config
from pocl_dist.display.output import say, warn
from pocl_dist.errors import BusyError, DivergedError, PoclError, StoppedError, StorageError
from pocl_dist.pipeline.comparison import rates
from pocl_dist.pipeline.comparison.ablations import AblationRow
from pocl_dist.pipeline.comparison.arms import Arm, RowCounts
from pocl_dist.pipeline.comparison.children import last_words, train_all
from pocl_dist.pipeline.comparison.folders import ComparedRun, RunKey, run_of, with_baselines
from pocl_dist.pipeline.comparison.inner import do_steps
from pocl_dist.pipeline.comparison.shared import link_shared
from pocl_dist.pipeline.comparison.state import Inputs, RunLook, look
from pocl_dist.pipeline.evaluate import evaluate
from pocl_dist.pipeline.report import report
from pocl_dist.pipeline.run_directory import RunDirectory
from pocl_dist.pipeline.stop_request import StopRequest


@dataclass
class Comparison:
    """All that is decided before the first training, and how the runs were last seen to stand."""

    base: Config
    arms: tuple[Arm, ...]
    ablations: tuple[AblationRow, ...]
    grid: tuple[float, ...]
    seeds: tuple[int, ...]
    counts: RowCounts
    target_visits: int
    inputs: Inputs
    looks: dict[RunKey, RunLook] = field(default_factory=dict)

    @property
    def run(self) -> RunDirectory:
        """Returns the comparison's own directory."""
        return RunDirectory(Path(self.base.run_dir))

    def compared(self, arm: Arm, learning_rate: float, seed: int) -> ComparedRun:
        """Returns a run; that of the first arm and seed answers for teacher and start as well."""
        found = run_of(self.base, arm, learning_rate, seed)
        is_first = arm == self.arms[0] and seed == self.seeds[0]
        return with_baselines(found) if is_first else found

    def look(self, compared: ComparedRun) -> RunLook:
        """Returns how a run stands; looked at again only after `forget`."""
        if compared.key not in self.looks:
            self.looks[compared.key] = look(compared, self.inputs)
        return self.looks[compared.key]

    def forget(self, compared: ComparedRun) -> None:
        """Says that a run has changed."""
        self.looks.pop(compared.key, None)

    def candidates(self, arm: Arm) -> list[rates.Candidate]:
        """Returns the learning rates of an arm with what the first seed's runs say of them."""
        found = []
        for rate in self.grid:
            compared = self.compared(arm, rate, self.seeds[0])
            seen = self.look(compared)
            is_trained = seen.state in ("trained", "done")
            dev = rates.dev_of(compared) if is_trained else None
            found.append(rates.Candidate(rate, seen, dev))
        return found

    def chosen_rate(self, arm: Arm) -> float | None:
        """Returns the arm's learning rate; None while a candidate may still be trained."""
        candidates = self.candidates(arm)
        is_open = any(c.look.state in ("missing", "unfinished") for c in candidates)
        if is_open and len(candidates) > 1:
            return None
        return rates.choose(candidates, self.base.dev.is_higher_better)

    def chosen_runs(self, seeds: Sequence[int]) -> Iterator[ComparedRun]:
        """Yields the runs of the table, of arms whose learning rate is chosen."""
        for arm in self.arms:
            rate = self.chosen_rate(arm)
            if rate is not None:
                for seed in seeds:
                    yield self.compared(arm, rate, seed)


def work(
    comparison: Comparison,
    num_jobs: int,
    is_training: bool,
    stop: StopRequest,
    on_round: Callable[[], object],
) -> None:
    """Trains and answers what is missing; `on_round` is called when all arms have one more seed."""
    first, *others = comparison.seeds
    grid_runs = [
        comparison.compared(arm, rate, first) for arm in comparison.arms for rate in comparison.grid
    ]
    if is_training:
        _train(comparison, grid_runs, num_jobs, stop)
    _answer(comparison, list(comparison.chosen_runs([first])), stop)
    on_round()
    for seed in others:
        runs = list(comparison.chosen_runs([seed]))
        if is_training:
            _train(comparison, runs, num_jobs, stop)
        _answer(comparison, runs, stop)
        on_round()


def needs_training(seen: RunLook) -> bool:
    """Returns whether a run is to be trained, or trained on."""
    if seen.state == "failed":
        return seen.exit_code != DivergedError.exit_code
    return seen.state in ("missing", "unfinished")


def _train(
    comparison: Comparison, runs: Iterable[ComparedRun], num_jobs: int, stop: StopRequest
) -> None:
    pending = [compared for compared in runs if needs_training(comparison.look(compared))]
    total = len(pending)
    seconds_taken: list[float] = []

    def next_run() -> ComparedRun | None:
        while pending:
            compared = pending.pop(0)
            try:
                link_shared(comparison.base, compared, comparison.counts)
            except BusyError as error:
                warn(f"{compared.key.name}: {error}; it is left to that run")
                continue
            place = f"{total - len(pending)}/{total}"
            say(f"── {place} {compared.key.name} (log: {compared.log_file})")
            return compared
        return None

    def on_end(compared: ComparedRun, code: int, seconds: float) -> None:
        comparison.forget(compared)
        if code == StorageError.exit_code:
            raise StorageError(f"{compared.key.name}: {last_words(compared.log_file)}")
        if code == 0:
            seconds_taken.append(seconds)
            left = sum(seconds_taken) / len(seconds_taken) * len(pending) / num_jobs
            text = f", about {left / 60:.0f} min for the others of this round" if pending else ""
            say(f"   {compared.key.name}: trained in {seconds:.0f} s{text}")
        elif code != StoppedError.exit_code:
            warn(f"{compared.key.name} ended with {code}: {last_words(compared.log_file)}")

    if pending:
        train_all(next_run, on_end, num_jobs, stop)


def _answer(comparison: Comparison, runs: Sequence[ComparedRun], stop: StopRequest) -> None:
    """Lets the chosen exports answer the test sets, all in one Ray session."""
    open_runs = [c for c in runs if comparison.look(c).state == "trained"]
    if not open_runs:
        return
    from pocl_dist.pipeline.actor_pass import actors_of  # torch: not before it is needed

    with actors_of(comparison.base, comparison.run) as waiting:
        waiting.install()  # `ray.init` has put handlers of its own in place, which abort
        for compared in open_runs:
            if waiting.is_asked() or stop.is_asked():
                raise StoppedError("stopped between test sets; the same command goes on from there")
            say(f"── test sets: {compared.key.name}")
            comparison.forget(compared)
            try:
                do_steps(compared.config, [("evaluate", evaluate), ("report", report)])
            except (StoppedError, StorageError):
                raise
            except PoclError as error:
                warn(f"{compared.key.name}: not evaluated: {error}")
