"""Which checkpoints are whole. A checkpoint counts once its last file, ``complete.json``, is there and every
file that lists still has its size; one that a kill cut short does not count and is removed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from kore.artifacts import atomic_write, read_json
from kore.errors import ArtifactError

COMPLETE = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def mark_complete(checkpoint: Path, step: int) -> None:
    """Write the mark that makes a checkpoint count. Call it when every other file is written."""
    files = {
        entry.relative_to(checkpoint).as_posix(): entry.stat().st_size
        for entry in sorted(checkpoint.rglob("*"))
        if entry.is_file() and entry.name != COMPLETE
    }
    atomic_write(checkpoint / COMPLETE, json.dumps({"step": step, "files": files}, indent=1) + "\n")


def is_complete(checkpoint: Path) -> bool:
    """Whether the checkpoint is marked and all its files have the size they were written with."""
    try:
        files = read_json(checkpoint / COMPLETE)["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (ArtifactError, OSError, KeyError, TypeError, AttributeError):
        return False


def _checkpoints(directory: Path) -> list[Path]:
    """Checkpoint directories, oldest first."""
    found = [(int(match[1]), entry) for entry in directory.glob("*") if (match := _NAME.fullmatch(entry.name))]
    return [entry for _, entry in sorted(found)]


def newest_complete(directory: Path) -> Path | None:
    """The newest checkpoint that is whole."""
    return next((entry for entry in reversed(_checkpoints(directory)) if is_complete(entry)), None)


def remove_incomplete(directory: Path) -> None:
    """Delete the checkpoints that a kill cut short."""
    for checkpoint in _checkpoints(directory):
        if not is_complete(checkpoint):
            shutil.rmtree(checkpoint)


def keep_newest(directory: Path, limit: int) -> None:
    """Delete all but the newest ``limit`` whole checkpoints; ``limit`` 0 deletes all."""
    whole = [checkpoint for checkpoint in _checkpoints(directory) if is_complete(checkpoint)]
    for checkpoint in whole[: max(0, len(whole) - limit)]:
        (checkpoint / COMPLETE).unlink()
        shutil.rmtree(checkpoint)
