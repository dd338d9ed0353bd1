"""The exit codes, and one exception class for each that a user can meet.

A launcher or scheduler reads the code (or `status.json`, because launchers lose codes); a person
reads the message. Anything that is not one of these classes is a bug in pocl_dist and exits 70.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExitCode:
    """One row of the table that `pocl-dist exit-codes` prints."""

    code: int
    name: str
    meaning: str
    is_retryable: bool = False


EXIT_CODES: tuple[ExitCode, ...] = (
    ExitCode(0, "done", "the step's result is written"),
    ExitCode(2, "usage", "the command line is wrong"),
    ExitCode(64, "config", "the config is wrong: unknown key, type, range, divisibility"),
    ExitCode(65, "data", "rows are wrong: bad rows, duplicate ids, too few rows"),
    ExitCode(66, "no-input", "a file, model or tokenizer is missing"),
    ExitCode(69, "unavailable", "Ray, a port or a hub was not reachable in time", True),
    ExitCode(70, "bug", "an unexpected exception: please report it"),
    ExitCode(71, "worker-lost", "a rank or an actor died, hung or disagreed", True),
    ExitCode(73, "busy", "the run directory is in use by a live run"),
    ExitCode(74, "io", "the disk is full or a file cannot be written"),
    ExitCode(75, "stopped", "stopped on request and saved: submit it again", True),
    ExitCode(76, "diverged", "the loss or the gradient is not finite"),
    ExitCode(77, "refused", "refused for security"),
    ExitCode(
        78, "mismatch", "tokenizers, or what is resumed and its inputs, do not belong together"
    ),
)
_BY_CODE = {row.code: row for row in EXIT_CODES}


class PoclError(Exception):
    """Base of every error that is not a bug; the subclass fixes the exit code."""

    exit_code = 70


class UsageError(PoclError):
    """The command line is wrong."""

    exit_code = 2


class ConfigError(PoclError, ValueError):
    """A config key is unknown, of the wrong type, out of range or contradicts another."""

    exit_code = 64


class DataError(PoclError, ValueError):
    """A row or a data file is unusable; the message names file and row."""

    exit_code = 65


class MissingInputError(PoclError):
    """A file, model or tokenizer that the config names is not there."""

    exit_code = 66


class UnavailableError(PoclError):
    """Something outside this process could not be reached in time."""

    exit_code = 69


class WorkerError(PoclError):
    """A rank or actor died, hung, or holds another state than rank 0."""

    exit_code = 71


class BusyError(PoclError):
    """The run directory is locked by a live run."""

    exit_code = 73


class StorageError(PoclError):
    """Writing failed: disk full, quota, read-only."""

    exit_code = 74


class StoppedError(PoclError):
    """A stop was asked for and the state is saved; the same command goes on."""

    exit_code = 75


class DivergedError(PoclError):
    """The loss or the gradient norm is not finite."""

    exit_code = 76


class RefusedError(PoclError):
    """Refused for security: remote code, pickled weights, a path that leaves its folder."""

    exit_code = 77


class MismatchError(PoclError):
    """Two inputs do not belong together."""

    exit_code = 78


def error_of(code: int, reason: str) -> PoclError | None:
    """Returns the exception of an exit code; None for a code that has none."""
    kinds = {kind.exit_code: kind for kind in PoclError.__subclasses__()}
    return kinds[code](reason) if code in kinds else None


def exit_code_row(code: int) -> ExitCode:
    """Returns the table's row for `code`; an unlisted code counts as a bug (70)."""
    return _BY_CODE.get(code, _BY_CODE[70])
