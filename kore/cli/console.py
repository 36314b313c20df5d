"""What the commands print: results on standard output, everything else on standard error."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from kore.processes import is_main_process

F = TypeVar("F", bound=Callable[..., Any])
_STYLES = {"done": "green", "skipped": "dim", "runs": "yellow"}
_MARKS = {"done": "✓", "skipped": "·", "runs": "→"}


class Interrupted(Exception):
    """The user pressed Ctrl-C."""


def interruptible(command: F) -> F:
    """Make a command end on Ctrl-C in the same way with every version of the command-line library."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            raise Interrupted from None

    return wrapped  # type: ignore[return-value]


def interactive() -> bool:
    """Whether progress bars have somewhere to go."""
    return sys.stderr.isatty() and is_main_process()


def say(text: str) -> None:
    """Print a line, from the main process only."""
    if is_main_process():
        _console(sys.stdout).print(text, markup=False, highlight=False, soft_wrap=True)


def show(renderable: Any) -> None:
    """Print a rich table or text, from the main process only."""
    if is_main_process():
        _console(sys.stdout).print(renderable)


def stage(name: str, state: str, remark: str) -> None:
    """Say in one line what became of a stage."""
    if is_main_process():
        from rich.text import Text

        line = Text.assemble((f"{_MARKS[state]} ", _STYLES[state]), (f"{name:<12}", "bold"), f"{state:<8} ", remark)
        _console(sys.stdout).print(line, soft_wrap=True)


def check(name: str, state: str, detail: str) -> None:
    """Say in one line how something stands: ok, note or missing."""
    from rich.text import Text

    style = {"ok": "green", "note": "yellow", "missing": "bold red"}[state]
    line = Text.assemble((f"{state:<8}", style), (f"{name:<19} ", "bold"), detail)
    _console(sys.stdout).print(line, soft_wrap=True)


def error(text: str) -> None:
    """Print an error line."""
    _line("error", "bold red", text)


def warning(text: str) -> None:
    """Print a warning line."""
    _line("warning", "yellow", text)


class LogHandler(logging.Handler):
    """Shows KORE's own log: warnings as such, the rest dimmed; from the main process only."""

    def emit(self, record: logging.LogRecord) -> None:
        if not is_main_process():
            return
        if record.levelno >= logging.WARNING:
            warning(record.getMessage())
        else:
            _line("", "dim", record.getMessage())


def show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Show KORE's own warnings in one line, in place of ``warnings.showwarning``; other libraries' are left out."""
    if f"{os.sep}kore" in filename and is_main_process():
        warning(str(message))


def _line(label: str, style: str, text: str) -> None:
    from rich.text import Text

    line = Text.assemble((f"{label}: ", style), text) if label else Text(text, style)
    _console(sys.stderr).print(line, soft_wrap=True)


def _console(file: Any) -> Any:
    from rich.console import Console

    return Console(file=file)
