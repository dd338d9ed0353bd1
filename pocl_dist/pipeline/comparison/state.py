"""What the run directory of a comparison's run holds. Looks only; loads no torch.

`mixed`: something in it was made from another config, other rows or other models than now.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from pocl_dist.errors import MismatchError, PoclError
from pocl_dist.files import JSONValue, read_json, sha256_file
from pocl_dist.models.sources import MARKER
from pocl_dist.pipeline import evaluate
from pocl_dist.pipeline.comparison.folders import ComparedRun
from pocl_dist.pipeline.inputs import result_inputs
from pocl_dist.pipeline.probes import resumed_results
from pocl_dist.pipeline.run_lock import is_locked
from pocl_dist.pipeline.status_file import read_status

State = Literal["done", "trained", "unfinished", "failed", "mixed", "missing"]


@dataclass(frozen=True)
class RunLook:
    """How a run stands; `reason` says why, for all but `done`."""

    state: State
    reason: str = ""
    exit_code: int | None = None


@dataclass(frozen=True)
class Inputs:
    """Digests that all runs must share: taken once, because models are large."""

    train: Mapping[str, str]  # of the training rows, by `data.responses`
    tests: Mapping[str, str]  # by test set
    models: Mapping[str, JSONValue]  # `digest.*` of an export's record: dev rows, both models


def look(compared: ComparedRun, inputs: Inputs) -> RunLook:
    """Returns how a run stands."""
    run = compared.run
    if not run.status.exists():
        return RunLook("missing", "it was not started")
    try:
        status = read_status(run.status)
        resumed_results(compared.config)
        _check_rows(compared, inputs)
        if (run.export / MARKER).exists():
            _check_export(compared, inputs)
            return _trained(compared, inputs, status)
    except (PoclError, OSError, ValueError, KeyError, TypeError) as error:
        return RunLook("mixed", " ".join(str(error).split()))
    return _untrained(compared, status)


def _untrained(compared: ComparedRun, status: Mapping[str, JSONValue]) -> RunLook:
    code, reason = status["exit_code"], str(status["reason"])
    if status["state"] == "failed" and isinstance(code, int):
        return RunLook("failed", reason or f"exit code {code}", code)
    step, num_steps = status.get("step"), status.get("num_steps")
    reached = f"saved at step {step} of {num_steps}" if step is not None else "nothing is saved"
    verb = "is at work" if is_locked(compared.run.root) else "ended early"
    return RunLook("unfinished", f"{verb} in {status['phase']}, {reached}")


def _check_rows(compared: ComparedRun, inputs: Inputs) -> None:
    """Raises MismatchError when the run was planned over other rows than those of now."""
    run = compared.run
    if not run.plan.exists():
        return
    made_from = cast("dict[str, JSONValue]", read_json(run.plan)["inputs"])
    expected = inputs.train.get(compared.config.data.responses)
    if expected is not None and made_from["data.train sha256"] != expected:
        raise MismatchError(f"{run.plan} was made from other training rows than those of now")


def _check_export(compared: ComparedRun, inputs: Inputs) -> None:
    """Raises MismatchError when the export is not what `launch_local.is_distilled` would accept."""
    run = compared.run
    expected = {
        **result_inputs(compared.config),
        "plan sha256": sha256_file(run.plan),
        **inputs.models,
    }
    found = read_json(run.export / MARKER)
    differing = [key for key in sorted({*found, *expected}) if found.get(key) != expected.get(key)]
    if differing:
        raise MismatchError(f"{run.export} was made with other {', '.join(differing)} than now")


def _trained(compared: ComparedRun, inputs: Inputs, status: Mapping[str, JSONValue]) -> RunLook:
    expected = evaluate.config_keys(compared.config)
    stems = ["answers", *(["answers-teacher"] if compared.config.evaluate.baselines else [])]
    for name, digest in inputs.tests.items():
        folder = compared.run.eval / name
        record = folder / "inputs.json"
        if record.exists():
            found = read_json(record)
            differing = [key for key, value in expected.items() if found.get(key) != value]
            if differing or found.get(f"data.eval {name} sha256") != digest:
                what = ", ".join(differing) or "rows"
                raise MismatchError(f"{folder} was answered with other {what} than now")
        is_answered = all((folder / f"{stem}.jsonl").exists() for stem in stems)
        if not (is_answered and (folder / "report.json").exists()):
            why = f": {status['reason']}" if status["state"] == "failed" else ""
            return RunLook("trained", f"test set {name} is not answered yet{why}")
    return RunLook("done")
