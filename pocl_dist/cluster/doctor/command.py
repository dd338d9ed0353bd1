"""`pocl-dist doctor`: examines, prints, and returns what the run would end with."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence

from pocl_dist.cluster.doctor.case import Options, Probe
from pocl_dist.cluster.doctor.checks.nodes import is_main_process
from pocl_dist.cluster.doctor.examine import examine, exit_code_of
from pocl_dist.cluster.doctor.output import is_terminal, terminal_width, text_of
from pocl_dist.guards import printable


def doctor(
    words: Sequence[str], options: Options, probes: Mapping[str, Probe], as_json: bool
) -> int:
    """Prints the findings and returns the first error's exit code, 0 when the run would start.

    Started on many nodes or ranks, the first process prints all, the others only their errors.
    """
    findings = examine(words, options, probes)
    code = exit_code_of(findings)
    if not is_main_process():
        for finding in findings:
            if finding.severity == "error":
                print(f"doctor: {finding.check}: {printable(finding.what)}", file=sys.stderr)
        return code
    if as_json:
        rows = [finding.to_json() for finding in findings]
        print(json.dumps({"exit_code": code, "findings": rows}, indent=1))
        return code
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:  # a row may hold what the terminal's encoding has not
        reconfigure(errors="replace")
    print(text_of(findings, is_terminal(), terminal_width()), flush=True)
    return code
