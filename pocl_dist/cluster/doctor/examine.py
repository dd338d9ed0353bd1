"""Runs the checks over a config; the first error is what the run would end with."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pocl_dist.cluster.doctor.case import Case, Check, Options, Probe
from pocl_dist.cluster.doctor.finding import Finding, SkipError, error, ok, skipped
from pocl_dist.cluster.doctor.registry import CHECKS
from pocl_dist.config import Config, load_words
from pocl_dist.errors import PoclError
from pocl_dist.files import explain_storage_error

CONFIG = "config"
"""Name of the first check; without a config there is nothing to ask the others."""


def examine(words: Sequence[str], options: Options, probes: Mapping[str, Probe]) -> list[Finding]:
    """Returns all findings about the run that `words` (files and overrides) describe, in order."""
    config, findings = _read_config(words)
    if config is None:
        return findings
    with tempfile.TemporaryDirectory(prefix="pocl-doctor-") as scratch:
        case = Case(config, options, probes, Path(scratch))
        for check in CHECKS:
            findings += _run(check, case)
    return findings


def exit_code_of(findings: Sequence[Finding]) -> int:
    """Returns what the run would end with, as far as can be told: the first error's code, or 0."""
    return next((int(f.exit_code) for f in findings if f.exit_code is not None), 0)


def _read_config(words: Sequence[str]) -> tuple[Config | None, list[Finding]]:
    try:
        config = load_words(words)
    except PoclError as problem:
        why = "The config is read before anything else; nothing more can be looked at until then."
        how = "Correct the keys; each line names its key and what is allowed."
        lines = str(problem).splitlines()
        found = [error(problem.exit_code, line, why, how) for line in lines]
    else:
        return config, [replace(ok(f"valid; the run directory is {config.run_dir}"), check=CONFIG)]
    return None, [replace(finding, check=CONFIG) for finding in found]


def _run(check: Check, case: Case) -> Iterator[Finding]:
    """Yields a check's findings; what it raises as a run would is an error with that code."""
    try:
        for finding in check.function(case):
            yield _filled(finding, check)
    except SkipError as reason:
        yield _filled(skipped(str(reason), reason.how), check)
    except PoclError as problem:
        yield _filled(error(problem.exit_code, str(problem)), check)
    except OSError as problem:
        line = explain_storage_error(problem)
        if line is None:
            raise
        yield _filled(error(74, line), check)


def _filled(finding: Finding, check: Check) -> Finding:
    if finding.severity != "error":
        return replace(finding, check=check.name)
    return replace(
        finding, check=check.name, why=finding.why or check.why, how=finding.how or check.how
    )
