"""The entry point: runs a command and turns every failure into one line and an exit status.

0: done. 1: an unexpected error. 2: something the user gave is wrong. 130: interrupted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence

from kore.cli import console
from kore.errors import KoreError
from kore.processes import is_main_process


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    if debug:
        words = [word for word in words if word != "--debug"]
    try:
        with _quiet_libraries(debug):
            return _run(words)
    except KoreError as error:
        if debug:
            traceback.print_exc()
        if is_main_process():
            console.error(str(error))
        return 2
    except console.Interrupted:
        if is_main_process():
            console.error("interrupted; the same command goes on where it stopped")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        process = "" if is_main_process() else f"process {os.environ['RANK']}: "
        hint = "" if debug else "; --debug shows where"
        console.error(f"{process}unexpected {type(error).__name__}: {first}{hint}")
        return 1


def _run(words: list[str]) -> int:
    import typer

    from kore.cli.app import app

    try:
        typer.main.get_command(app)(args=words, prog_name="kore")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@contextlib.contextmanager
def _quiet_libraries(debug: bool) -> Iterator[None]:
    """Keep other libraries' chatter off the terminal, and show KORE's own log and warnings in one line each."""
    logger = logging.getLogger("kore")
    before = logger.handlers, logger.level, logger.propagate, warnings.showwarning
    logger.handlers, logger.propagate = [console.LogHandler()], False
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        warnings.showwarning = console.show_warning
        if "transformers" in sys.modules:  # too late for the environment
            sys.modules["transformers"].utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.handlers, level, logger.propagate, warnings.showwarning = before
        logger.setLevel(level)
