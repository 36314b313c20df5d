"""Run stages one after another, skipping those whose result is already there.

A stage's key is a hash of everything its result depends on: its part of the configuration and the contents of what
it reads (data files, model, results of earlier stages). The key is recorded beside the result, first as "running"
and then as "done". A stage that is done under the same key is skipped; one that was cut short under the same key
goes on where it stopped; under another key it starts from nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol, TypeVar

from kore import __version__
from kore.artifacts import MANIFEST, SCHEMA_VERSION, atomic_write, file_sha256
from kore.errors import ArtifactError, KoreError

RECORDS = ".kore"
_SAMPLE = 1 << 20
C = TypeVar("C", contravariant=True)
Say = Callable[[str, str, str], None]


class Stage(Protocol[C]):
    """One step of a run.

    Attributes:
        name: How the stage is called on the command line and in messages.
        output: The file or directory that holds the result.
    """

    @property
    def name(self) -> str: ...

    @property
    def output(self) -> Path: ...

    def inputs(self) -> dict[str, Any]:
        """What the result depends on, as flat JSON-serialisable values; asked just before the stage's turn."""

    def complete(self) -> bool:
        """Whether the result is there."""

    def check(self, context: C) -> None:
        """Raise what :meth:`run` would raise for wrong data or settings; asked before any stage runs."""

    def run(self, context: C) -> str:
        """Do the work, going on from what is in ``output``; returns a few words about the result."""


def run_stages(stages: Sequence[Stage[C]], context: C, say: Say, rerun: Sequence[str] = ()) -> None:
    """Check every stage that is not done, so that a mistake in the last shows before hours in the first; then run
    the stages in order.

    Args:
        stages: The stages; each reads only results of earlier ones.
        context: Passed to every stage that runs.
        say: Called with (stage, "done" | "skipped" | "runs", remark).
        rerun: Names of stages to run again although they are done. Later stages follow if the result changes.

    Raises:
        KoreError: ``rerun`` names no stage.
        ArtifactError: A result would replace a directory that no stage has made.
    """
    names = [stage.name for stage in stages]
    for name in rerun:
        if name not in names:
            raise KoreError(f"rerun: no stage is named {name!r}; the stages here are {', '.join(names)}")
    for stage in stages:
        if not is_done(stage):
            stage.check(context)
    for stage in stages:
        about = begin(stage, say, again=stage.name in rerun)
        if about is not None:
            started = time.perf_counter()
            result = stage.run(context)
            finish(stage, about, result, time.perf_counter() - started, say)


def is_done(stage: Stage[Any]) -> bool:
    """Whether the stage has a result, which may be of other inputs."""
    return read_record(stage.output).get("state") == "done" and stage.complete()


def begin(stage: Stage[Any], say: Say, again: bool = False) -> dict[str, Any] | None:
    """Make the output ready and record that the stage runs; returns what is known of it, None for one to be skipped.

    Raises:
        ArtifactError: The result would replace a directory that no stage has made.
    """
    inputs = stage.inputs()
    key = _key(inputs)
    file = record_file(stage.output)
    record = read_record(stage.output)
    same = record.get("key") == key and not again
    if same and record.get("state") == "done" and stage.complete():
        say(stage.name, "skipped", f"already done: {record.get('result', '')}".rstrip(": "))
        return None
    reason = _reason(record, inputs, same, again)
    if reason:
        say(stage.name, "runs", reason)
    if not same:
        if not record and stage.output.is_dir() and any(stage.output.iterdir()):
            raise ArtifactError(
                f"{stage.output}: there is something here already, and no record of how it was made; "
                "delete it or choose another output"
            )
        _remove(file)
        _remove(stage.output)
    about = {"schema_version": SCHEMA_VERSION, "library_version": __version__, "key": key, "inputs": inputs}
    _write(file, {**about, "state": "running"})
    return about


def finish(stage: Stage[Any], about: Mapping[str, Any], result: str, seconds: float, say: Say) -> None:
    """Record that the stage has done its work."""
    finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
    times = {"seconds": round(seconds, 2), "finished": finished}
    _write(record_file(stage.output), {**about, "state": "done", "result": result, **times})
    say(stage.name, "done", f"{result} ({duration(seconds)})")


def record_file(output: Path) -> Path:
    """Where the key and state of the stage that makes ``output`` are kept: beside it, since it is replaced whole."""
    return output.parent / RECORDS / f"{output.name}.json"


def read_record(output: Path) -> dict[str, Any]:
    """The record of the stage that makes ``output``; empty when it has never run or the record cannot be read."""
    try:
        record = json.loads(record_file(output).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _write(file: Path, record: Mapping[str, Any]) -> None:
    atomic_write(file, json.dumps(record, indent=2) + "\n")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _reason(record: Mapping[str, Any], inputs: Mapping[str, Any], same: bool, again: bool) -> str:
    """Why a stage that has a record runs, in a few words; empty for one that has none."""
    if not record:
        return ""
    if again:
        return "again, as asked"
    if same:
        running = record.get("state") == "running"
        return "goes on where it was stopped" if running else "again, its result is not as asked"
    before = record.get("inputs", {})
    changed = [name for name in {**before, **inputs} if before.get(name) != inputs.get(name)]
    if not changed:
        return "again, its record is from another version"
    name, more = changed[0], f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    old, new = before.get(name), inputs.get(name)
    short = all(len(str(value)) <= 40 and not isinstance(value, dict) for value in (old, new))
    return f"again, {name} is now {new!r}, was {old!r}{more}" if short else f"again, {name} has changed{more}"


def _key(inputs: Mapping[str, Any]) -> str:
    text = json.dumps({"schema_version": SCHEMA_VERSION, **inputs}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def model_identity(path: str) -> str:
    """A hash that tells checkpoints apart without reading them whole; a hub id stands for itself.

    Files count by name, size, and their first and last MiB.
    """
    directory = Path(path)
    if not directory.is_dir():
        return path
    digest = hashlib.sha256()
    for file in sorted(entry for entry in directory.iterdir() if entry.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(_SAMPLE))
            if size > _SAMPLE:
                stream.seek(max(_SAMPLE, size - _SAMPLE))
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()


def directory_identity(directory: Path) -> str:
    """A hash of an artifact's content: of its manifest where it has one, else of every file."""
    if (directory / MANIFEST).is_file():
        return file_sha256(directory / MANIFEST)
    digest = hashlib.sha256()
    for file in sorted(entry for entry in directory.rglob("*") if entry.is_file()):
        digest.update(f"{file.relative_to(directory)}\0{file_sha256(file)}\0".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def only_one(output: Path) -> Iterator[None]:
    """Hold an output against other processes; the system lets go when the process dies.

    Raises ArtifactError when another process holds it.
    """
    lock = record_file(output).with_suffix(".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ArtifactError(
                f"{output}: another process is working here; wait for it or choose another output"
            ) from None
        yield


def duration(seconds: float) -> str:
    """Seconds as people say them: 0.4 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 item, 2,000 items."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
