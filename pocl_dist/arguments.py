"""The command line: which subcommands there are and what they take."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pocl_dist import __version__
from pocl_dist.cluster.estimate.arguments import add_arguments
from pocl_dist.cluster.targets import TARGETS
from pocl_dist.display import output

CONFIG_COMMANDS = {
    "run": "all steps that the config needs; trains one student",
    "init-student": "make the student by cutting layers from the teacher "
    "(models.student.init_layers)",
    "generate": "write the teacher's answers to the training prompts as a data set (Ray)",
    "measure": "score every training row with the student before training (Ray)",
    "plan": "rank the rows, cut the stages, set temperature and KD ratio",
    "cache": "let the teacher answer every training row once (teacher.source: cache_*)",
    "distill": "train the student as planned (DeepSpeed) and export it",
    "evaluate": "answer the test sets with the export; ROUGE-L and exact match (Ray)",
    "report": "sum the run up in report.json and report.html",
}

OUTPUT_OPTIONS: dict[output.Mode, str] = {
    "quiet": "print warnings and errors only; the same as log.output=quiet",
    "json": "print one JSON object per line, the last one states the outcome; log.output=json",
}


def _add_config_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `run` and the steps: a config, and how they show what they do."""
    for name, text in CONFIG_COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "config",
            nargs="+",
            metavar="CONFIG.yaml | section.key=value",
            help="files are layered left to right",
        )
        shown = command.add_mutually_exclusive_group()
        for option, text in OUTPUT_OPTIONS.items():
            shown.add_argument(
                f"--{option}", dest="output", action="store_const", const=option, help=text
            )
        if name == "evaluate":
            command.add_argument(
                "--harness",
                action="append",
                metavar="TASKS",
                help="also tasks of the lm-evaluation-harness: names, files or folders, with "
                "commas; the same as evaluate.harness=[...]",
            )
        if name in ("run", "distill"):
            command.add_argument(
                "--max-restarts", type=int, metavar="N", help="the same as run.max_restarts=N"
            )


class _WholeNames(argparse.ArgumentParser):
    """Takes whole option names only, as do its subcommands: a new option may share a beginning."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of all subcommands."""
    parser: argparse.ArgumentParser = _WholeNames(
        prog="pocl-dist",
        description="Distil a language model with the POCL curriculum (arXiv 2506.05695).",
    )
    parser.add_argument("--version", action="version", version=f"pocl-dist {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_config_commands(commands)
    _add_compare(commands)
    text = "memory, time and disk that a config needs on a cluster; loads no model"
    add_arguments(commands.add_parser("estimate", help=text, description=text))
    verify = commands.add_parser(
        "verify", help="re-check every file of a run directory against its manifest"
    )
    verify.add_argument("run_dir", type=Path)
    outcome = commands.add_parser("outcome", help="print status.json and exit with the run's code")
    outcome.add_argument("run_dir", type=Path)
    commands.add_parser("exit-codes", help="print the table of exit codes")
    launch = commands.add_parser(
        "launch", help="write the job files of a scheduler or launcher from the config, and submit"
    )
    launch.add_argument("--target", required=True, choices=sorted(TARGETS))
    launch.add_argument("config", nargs="+", metavar="CONFIG.yaml | section.key=value")
    launch.add_argument("--nodes", type=int, metavar="N", help="the same as launch.nodes=N")
    launch.add_argument(
        "--gpus-per-node", type=int, metavar="G", help="the same as launch.gpus_per_node=G"
    )
    launch.add_argument("--render", type=Path, metavar="DIR", help="write the files, no more")
    launch.add_argument("--dry-run", action="store_true", help="print the files, write nothing")
    doctor = commands.add_parser(
        "doctor", help="what would keep a run from starting: in seconds, without GPU or weights"
    )
    doctor.add_argument("config", nargs="+", metavar="CONFIG.yaml | section.key=value")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.add_argument("--nodes", type=int, metavar="N", help="the same as launch.nodes=N")
    doctor.add_argument(
        "--gpus-per-node", type=int, metavar="G", help="the same as launch.gpus_per_node=G"
    )
    doctor.add_argument("--gpu", action="store_true", help="it is an error if no GPU is here")
    doctor.add_argument(
        "--wait", type=float, default=60.0, metavar="SECONDS", help="for the other nodes of a job"
    )
    _add_score(commands)
    return parser


def _add_score(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    score = commands.add_parser("score", help="ROUGE-L and exact match of given answers")
    score.add_argument(
        "--predictions", type=Path, required=True, help='JSONL of {"text"} or {"id","text"}'
    )
    score.add_argument(
        "--references", type=Path, required=True, help="rows with the reference answers"
    )


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "plain KD against KD + POCL, per method, at equal sample visits: one table (resumable)"
    command = commands.add_parser("compare", help=text, description=text)
    command.add_argument("config", nargs="+", metavar="CONFIG.yaml | section.key=value")
    command.add_argument(
        "--methods", required=True, metavar="A,B", help="divergences (loss.name), and gkd"
    )
    command.add_argument("--seeds", required=True, metavar="1,2,3", help="the first chooses rates")
    command.add_argument(
        "--lr-grid", metavar="1e-4,3e-4", help="each arm takes the best on dev (default: one rate)"
    )
    command.add_argument(
        "--ablate",
        metavar="A,B",
        help="controls: restarts, order, temperature, ratio, stages, optimizer",
    )
    command.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="trainings at once on this machine"
    )
    command.add_argument(
        "--no-training", action="store_true", help="only evaluate and tabulate what is trained"
    )


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parsed command line; words of the config may stand behind an option too."""
    parser = make_parser()
    arguments, others = parser.parse_known_args(words)
    if others and (any(word.startswith("-") for word in others) or "config" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if others:
        arguments.config += others
    return arguments
