"""An engine's process: started with our launcher, its output in a log, ended with us; what its log says of failure."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kore.errors import ConfigError
from kore.retention.launchers.probe import MARK

_LAUNCHERS = Path(__file__).resolve().parent.parent / "launchers"
_PROBE_SECONDS = 300
_TAIL = 1 << 20
_ERROR = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt|Exit|Unavailable)(?::.*)?$")
_STATED = re.compile(r"\bError during evaluation: (.+?)(?:\. Please set .*)?$")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Ended:
    """How a process ended: ``code`` is its exit status, negative for a signal; None where the time was up."""

    code: int | None
    seconds: float
    log: Path

    def why(self) -> str:
        """What its log says of the failure, in one line."""
        if self.code is None:
            return f"stopped after {self.seconds:.0f} s, the time limit"
        ending = f"ended by {signal.Signals(-self.code).name}" if self.code < 0 else f"exit status {self.code}"
        said = last_error(read_log(self.log))
        return f"{said} ({ending})" if said else f"{ending} and nothing said"


def command(python: str, launcher: str, arguments: Sequence[str]) -> list[str]:
    """The command that runs one of ``kore.retention.launchers`` with that interpreter."""
    import kore

    packages = {"kore": str(Path(kore.__file__).resolve().parent)}
    kernels = Path(packages["kore"]).parent / "kore_kernels"
    if kernels.is_dir():
        packages["kore_kernels"] = str(kernels)
    return [python, str(_LAUNCHERS / "start.py"), str(os.getpid()), json.dumps(packages), launcher, *arguments]


def run(
    words: Sequence[str],
    log: Path,
    *,
    cwd: Path,
    environment: Mapping[str, str | None],
    time_limit: float | None = None,
) -> Ended:
    """Run a command to its end, all it says in ``log``.

    Args:
        words: Program and arguments.
        log: Replaced.
        cwd: Working directory.
        environment: Added to ours; None takes a variable away.
        time_limit: Seconds, or None.

    Raises:
        ConfigError: The program cannot be started.
    """
    merged = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    log.parent.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with open(log, "wb") as file:
        try:
            process = subprocess.Popen(
                list(words),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=merged,
                start_new_session=True,
            )
        except OSError as error:
            raise ConfigError(f"{words[0]}: cannot be started ({error})") from None
        code: int | None
        try:
            code = process.wait(time_limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    return Ended(code, time.monotonic() - begun, log)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the process and of those it started."""
    for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.poll()


def probe(python: str, question: Mapping[str, Any]) -> dict[str, Any]:
    """Ask an environment what it has (:mod:`kore.retention.launchers.probe`).

    Raises:
        ConfigError: It cannot be started, or is no Python interpreter.
    """
    words = [python, str(_LAUNCHERS / "probe.py"), json.dumps(dict(question))]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_PROBE_SECONDS, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise ConfigError(f"{python}: cannot be started ({error})") from None
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{python}: no answer within {_PROBE_SECONDS} s") from None
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            found: dict[str, Any] = json.loads(line[len(MARK) :])
            return found
    said = last_error(done.stderr) or f"exit status {done.returncode}"
    raise ConfigError(f"{python}: is it a Python interpreter? It said: {said}")


def read_log(file: Path) -> str:
    """The end of a log as plain text."""
    try:
        with open(file, "rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - _TAIL))
            text = stream.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return _ANSI.sub("", text).replace("\r", "\n")


def last_error(text: str) -> str:
    """The line of a log that says best what went wrong: the last exception, else the last line."""
    lines = [line.strip() for line in _ANSI.sub("", text).replace("\r", "\n").splitlines() if line.strip()]
    for line in reversed(lines):
        stated = _STATED.search(line)
        if _ERROR.match(line) or stated:
            return _short(stated[1] if stated else line)
    return _short(lines[-1]) if lines else ""


def _short(line: str) -> str:
    return line if len(line) <= 300 else f"{line[:297]}..."
