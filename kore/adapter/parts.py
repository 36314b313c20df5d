"""Finished factors on disk, so that an initialisation that was killed goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kore.artifacts import MANIFEST, atomic_directory, load_tensors, read_manifest, save_tensors, write_manifest
from kore.errors import KoreError

KIND = "factors"
_FILE = "factors.safetensors"


@dataclass(frozen=True)
class Part:
    """What was computed for the layers that share one input.

    Attributes:
        factors: A (r, d_in) by layer, on the CPU.
        note: What is known of the null space, JSON-serialisable.
    """

    factors: dict[str, torch.Tensor]
    note: dict[str, Any]


class Parts:
    """A working folder with one artifact for each finished :class:`Part`.

    Args:
        folder: The folder; None keeps nothing.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self._folder = None if folder is None else Path(folder)

    def read(self, index: int, identity: Mapping[str, Any]) -> Part | None:
        """The part with this number; None where it is not finished.

        Raises:
            KoreError: It was made from something else than ``identity`` says.
            ArtifactError: It is corrupt.
        """
        path = self._path(index)
        if path is None or not (path / MANIFEST).is_file():
            return None
        manifest = read_manifest(path, KIND)
        for name, value in _plain(identity).items():
            if manifest["identity"].get(name) != value:
                raise KoreError(f"{path}: was made with another {name}; delete {self._folder} to start again")
        return Part(load_tensors(path / _FILE), manifest["note"])

    def write(self, index: int, identity: Mapping[str, Any], part: Part) -> None:
        """Keep a part. Atomic."""
        path = self._path(index)
        if path is not None:
            with atomic_directory(path) as directory:
                save_tensors(part.factors, directory / _FILE)
                write_manifest(directory, KIND, {"identity": _plain(identity), "note": part.note})

    def _path(self, index: int) -> Path | None:
        return None if self._folder is None else self._folder / f"part-{index:05d}"


def _plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain
