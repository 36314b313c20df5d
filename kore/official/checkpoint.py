"""The tensors of a model directory, read and written one at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kore.artifacts import atomic_write, read_json, save_tensors
from kore.errors import ArtifactError
from kore.official.names import by_role

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth")
_FOLLOW_FROM_SETTINGS = ("rotary_emb.inv_freq", ".position_ids")  # stored by old versions, not weights
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """The safetensors files of a directory, one file or shards with an index.

    Tensors are read when asked for and lie in memory-mapped files, so the whole never has to fit into memory.

    Args:
        directory: A model directory.
        single: Name of the file where there are no shards.

    Raises:
        ArtifactError: No safetensors files, or one that is missing, truncated or not as the index says.
    """

    def __init__(self, directory: str | os.PathLike[str], single: str = SINGLE) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise ArtifactError(f"{self.directory}: no such directory")
        self._files: dict[Path, Any] = {}
        self.tensors: dict[str, Stored] = {}
        index = self.directory / INDEX
        if index.is_file():
            self._read_index(index)
        elif (self.directory / single).is_file():
            self.tensors = self._stored(self.directory / single)
        else:
            raise ArtifactError(self._nothing(single))
        self.roles = by_role(self.tensors, str(self.directory))

    def _read_index(self, index: Path) -> None:
        content = read_json(index)
        files = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(files, dict) or not files:
            raise ArtifactError(f"{index}: expected a weight_map of tensor names to files")
        for name in sorted(set(files.values())):
            if Path(name).name != name:
                raise ArtifactError(f"{index}: expected names of files beside it, got {name!r}")
            self.tensors |= self._stored(self.directory / name)
        absent = sorted(name for name in files.keys() - self.tensors.keys() if not name.endswith(_FOLLOW_FROM_SETTINGS))
        if absent:
            raise ArtifactError(f"{index}: {absent[0]} is not in {files[absent[0]]}; the checkpoint is incomplete")

    def _nothing(self, single: str) -> str:
        pickles = sorted(entry.name for entry in self.directory.iterdir() if entry.suffix in _PICKLES)
        if pickles:
            return (
                f"{self.directory}: its weights are pickles ({pickles[0]}), which can run code when they are read, and "
                "KORE reads none; write them as safetensors where you trust them: load the model with its own code, "
                "then model.save_pretrained(directory, safe_serialization=True)"
            )
        return f"{self.directory}: expected {single} or {INDEX}, found neither"

    def _stored(self, file: Path) -> dict[str, Stored]:
        from safetensors import SafetensorError, safe_open

        try:
            opened = safe_open(file, framework="pt")
            names = [name for name in opened.keys() if not name.endswith(_FOLLOW_FROM_SETTINGS)]  # noqa: SIM118
            slices = {name: opened.get_slice(name) for name in names}
        except FileNotFoundError:
            raise ArtifactError(f"{file}: no such file; the checkpoint is incomplete") from None
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{file}: not a readable safetensors file ({error}); fetch or write it again") from None
        self._files[file] = opened
        odd = [name for name, piece in slices.items() if piece.get_dtype() not in _DTYPES]
        if odd:
            raise ArtifactError(
                f"{file}: {odd[0]} has dtype {slices[odd[0]].get_dtype()}; expected {', '.join(_DTYPES)}, "
                "a checkpoint that is not quantised"
            )
        return {
            name: Stored(file, tuple(piece.get_shape()), _DTYPES[piece.get_dtype()]) for name, piece in slices.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._files[self.tensors[name].file].get_tensor(name)


def write_shards(
    directory: Path, tensors: Mapping[str, int], make: Callable[[str], Mapping[str, Tensor]], limit: int
) -> None:
    """Write tensors into shards of at most ``limit`` bytes, and an index; a larger group has a shard of its own.

    Args:
        directory: Where the files go.
        tensors: The names of the groups of tensors that are made together, with the bytes of each group.
        make: Gives the tensors of a group; at most one shard of them is held at a time.
        limit: Bytes.
    """
    shards: list[list[str]] = []
    room = 0
    for group, size in tensors.items():
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(group)
        room -= size
    weight_map: dict[str, str] = {}
    total = 0
    for number, groups in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        made = {key: tensor for group in groups for key, tensor in make(group).items()}
        save_tensors(made, directory / name, {"format": "pt"})
        weight_map |= dict.fromkeys(made, name)
        total += sum(tensor.nbytes for tensor in made.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        atomic_write(directory / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
