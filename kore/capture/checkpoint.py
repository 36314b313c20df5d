"""Save a running capture, and continue it after a kill with the same result."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from kore.artifacts import MANIFEST, atomic_directory, read_manifest, write_manifest
from kore.capture.input_groups import InputGroups
from kore.covariance import read_groups, write_groups
from kore.errors import ArtifactError, KoreError

KIND = "capture checkpoint"


class CaptureCheckpoint:
    """The state of a capture in a directory: groups, matrices, token counts, and which batches are in them.

    The batches are identified by a running sha256 of their tensors, so that a run is not continued on other
    data. Token buffers are flushed before a checkpoint, which keeps a stopped and an unstopped run bitwise alike.

    Args:
        path: The directory.
        options: What the call was asked for; a checkpoint with other options is refused.
        groups: The groups of the run, filled by :meth:`resume` and saved by :meth:`write`.
        place: For a module, the device of its input and the bytes of a number there.
    """

    def __init__(
        self,
        path: Path,
        options: dict[str, Any],
        groups: InputGroups,
        place: Callable[[str], tuple[torch.device, int]],
    ) -> None:
        self.path, self.options, self.groups, self.place = path, options, groups, place
        self._digest = hashlib.sha256()

    def resume(self, batches: Iterator[Mapping[str, Any]]) -> int:
        """Restore what is saved and take the finished batches from the iterator. Returns their number."""
        if not (self.path / MANIFEST).is_file():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise ArtifactError(f"{self.path}: expected a capture checkpoint or nothing there, found other files")
            return 0
        manifest = read_manifest(self.path, KIND, verify=False)
        for name, value in self.options.items():
            if manifest["options"].get(name) != value:
                raise KoreError(
                    f"{self.path}: this checkpoint was written with another {name}; delete it to start again"
                )
        done = int(manifest["done"])
        for index in range(done):
            batch = next(batches, None)
            if batch is None:
                raise KoreError(f"{self.path}: this checkpoint holds {done} batches, only {index} were given")
            self.see(batch)
        if self._digest.hexdigest() != manifest["batches_sha256"]:
            raise KoreError(f"{self.path}: this checkpoint was written for other batches; delete it to start again")
        groups, readers = read_groups(self.path, manifest)
        for group in groups:
            self.groups.add(group, *self.place(group.name)).restore(readers[group.name](), group.tokens)
        return done

    def see(self, batch: Mapping[str, Any]) -> None:
        """Note a batch as done."""
        _update(self._digest, batch)

    def write(self, done: int) -> None:
        """Save the run after ``done`` batches. The accumulators must be flushed. Atomic."""
        with atomic_directory(self.path) as directory:
            states = [(group.describe(), group.accumulator.triangle) for group in self.groups.groups]
            fields = {
                "groups": write_groups(directory, [(group, half) for group, half in states if half is not None]),
                "options": self.options,
                "done": done,
                "batches_sha256": self._digest.hexdigest(),
            }
            write_manifest(directory, KIND, fields)


def _update(digest: hashlib._Hash, value: Any) -> None:
    if isinstance(value, Mapping):
        for key in sorted(value):
            digest.update(f"{key}:".encode())
            _update(digest, value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            _update(digest, item)
    elif isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    else:
        digest.update(repr(value).encode())
