"""The one place that writes to stdout, in one of three modes (`log.output`, `--quiet`, `--json`).

    auto    lines, and on a terminal a live display below them
    quiet   nothing; warnings and errors still go to stderr
    json    one JSON object per line (docs/observing.md), the last one states the outcome; whatever
            else this process, its libraries and its children print goes to stderr

Nobody who watches can end a run: a reader that has left (`| head`) is not written to any more.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Literal

from pocl_dist.errors import exit_code_row
from pocl_dist.files import JSONValue
from pocl_dist.guards import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

Mode = Literal["auto", "quiet", "json"]
EVENT = b'{"event": '
"""How each line of ours begins in JSON mode: what a launcher of ranks prints does not."""


class _State:
    """What this process shows; one per process, as there is one stdout."""

    mode: Mode = "auto"
    json_descriptor: int | None = None
    live: Live | None = None


_lock = threading.Lock()


def mode() -> Mode:
    """Returns how this process shows things."""
    return _State.mode


def use(wanted: Mode) -> None:
    """Switches to another mode than `auto`, once; `kept` switches back."""
    if wanted == "auto" or _State.mode != "auto":
        return
    sys.stdout.flush()
    _State.mode = wanted
    if wanted == "json":
        _State.json_descriptor = os.dup(1)
        os.dup2(2, 1)
    else:
        _forget(1)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Puts stdout and mode back when the context ends; letters that stdout lacks are escaped."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a test may have put something simpler in its place
            stream.reconfigure(errors="backslashreplace")
    before = os.dup(1)
    try:
        yield
    finally:
        flush()
        os.dup2(before, 1)
        os.close(before)
        if _State.json_descriptor is not None:
            os.close(_State.json_descriptor)
        _State.mode, _State.json_descriptor = "auto", None


def say(text: str) -> None:
    """Prints a line; above the live display, if there is one."""
    if _State.mode == "json":
        emit("note", text=text)
    elif _State.live is not None:
        _State.live.console.print(printable(text), highlight=False, markup=False, soft_wrap=True)
    elif _State.mode == "auto":
        _print(printable(text))


def warn(text: str) -> None:
    """Prints a warning on stderr: something is allowed, but probably not what was meant."""
    emit("warning", text=text)
    try:
        print(f"warning: {printable(text)}", file=sys.stderr, flush=True)
    except BrokenPipeError:  # `2>&1 | head`
        _forget(2)


def emit(event: str, **values: object) -> None:
    """Writes a JSON line; in other modes nothing."""
    if _State.mode != "json":
        return
    row = {"event": event, "time": time.time(), **values}
    write_json_line((json.dumps(_finite(row), allow_nan=False) + "\n").encode())


def emit_outcome(command: str, code: int, reason: str) -> None:
    """Writes the last JSON line of a command."""
    row = exit_code_row(code)
    values = {"exit_code": code, "outcome": row.name, "retryable": row.is_retryable}
    emit("outcome", command=command, **values, reason=reason)


def flush() -> None:
    """Writes out what is still to be printed; a reader that has left is no error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _forget(1)


def _forget(descriptor: int) -> None:
    """Sends to nowhere what is still written there: nobody reads it any more."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), descriptor)


def _finite(value: object) -> JSONValue:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value  # type: ignore[return-value]


def write_json_line(line: bytes) -> None:
    """Writes a whole line to what was stdout when JSON mode began."""
    with _lock:
        if _State.json_descriptor is None:
            return
        try:
            while line:
                line = line[os.write(_State.json_descriptor, line) :]
        except BrokenPipeError:
            os.close(_State.json_descriptor)
            _State.json_descriptor = None


def for_child() -> int | None:
    """Returns what a child process is to have as stdout: a pipe for `relay_of` in JSON mode."""
    return subprocess.PIPE if _State.mode == "json" else None


def relay_of(stream: IO[bytes] | None) -> threading.Thread:
    """Returns a thread that hands on what ranks print: their JSON lines, the rest to stderr."""

    def relay() -> None:
        for line in stream or ():
            if line.startswith(EVENT):
                write_json_line(line)
            else:
                sys.stderr.buffer.write(line)
                sys.stderr.flush()

    thread = threading.Thread(target=relay, daemon=True)
    thread.start()
    return thread


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _forget(1)


def is_live() -> bool:
    """Returns whether stdout is a terminal on which a display can be drawn again and again."""
    return _State.mode == "auto" and sys.stdout.isatty() and os.environ.get("TERM", "") != "dumb"


def make_console() -> Console:
    """Returns a console that leaves the cursor visible, which a killed process could not do later.

    It goes on when its reader has left. In JSON mode it writes to stderr.
    """
    from rich.console import Console

    class Terminal(Console):
        def show_cursor(self, show: bool = True) -> bool:
            return False

        def on_broken_pipe(self) -> None:
            _forget(1)

    return Terminal(stderr=_State.mode == "json", quiet=_State.mode == "quiet")


def show(renderable: object) -> None:
    """Prints a table; in JSON mode to stderr, for people."""
    make_console().print(renderable)


@contextlib.contextmanager
def live(renderable: object) -> Iterator[None]:
    """Draws `renderable`, which may change, below all lines while the context lasts.

    Only on a terminal; elsewhere nothing is drawn.
    """
    if not is_live():
        yield
        return
    from rich.live import Live

    # Twice a second: drawing takes the time of the process that trains.
    with Live(renderable, console=make_console(), refresh_per_second=2) as _State.live:  # type: ignore[arg-type]
        try:
            yield
        finally:
            _State.live = None


def leave_terminal() -> None:
    """Ends a display line that a process which is ending at once, or was killed, left open."""
    if _State.mode == "auto" and os.isatty(1) and os.environ.get("TERM", "") != "dumb":
        os.write(1, b"\r\n")
