"""Save an adapter as a stock PEFT directory with a ``kore.json`` beside it, and load it back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kore import __version__
from kore.adapter.frozen import freeze_a
from kore.adapter.halves import freeze_halves
from kore.adapter.wrap import check_outside_zero_init, check_unadapted, check_whole
from kore.artifacts import atomic_directory, atomic_write, file_sha256, read_json
from kore.errors import ArtifactError, ConfigError, KoreError
from kore.models import check_fingerprint, model_fingerprint

if TYPE_CHECKING:
    from peft import PeftModel

KORE_FILE = "kore.json"
_SCHEMA_VERSION = 1
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(model: nn.Module, path: str | os.PathLike[str], *, extra: dict[str, Any] | None = None) -> None:
    """Write the adapter of a model, and its modules to save, as a directory that stock PEFT loads. Atomic.

    Beside PEFT's ``adapter_config.json`` and ``adapter_model.safetensors`` it holds ``kore.json``: how the
    adapter was made, the fingerprint of its base model, and the sha256 of both files.

    Args:
        model: A ``PeftModel``, also inside DistributedDataParallel.
        path: The directory; one that is there is replaced.
        extra: JSON-serialisable content to keep in ``kore.json`` under ``"extra"``.

    Raises:
        KoreError: The model has no adapter, or DeepSpeed ZeRO-3 holds it in parts.
    """
    peft_model = _peft_model(model)
    check_whole(peft_model)
    info = getattr(peft_model, "kore_info", None) or {
        "method": "lora",
        "a_frozen": False,
        "base_fingerprint": model_fingerprint(peft_model),
    }
    adapter = peft_model.active_adapter
    with atomic_directory(path) as directory:
        # False: PEFT would otherwise ask the hub whether the vocabulary was resized.
        peft_model.save_pretrained(str(directory), selected_adapters=[adapter], save_embedding_layers=False)
        if not (directory / _CONFIG).is_file():
            raise KoreError(f"save_adapter: expected the adapter to be named 'default', it is {adapter!r}")
        describe_adapter(peft_model, directory, info, extra)


def describe_adapter(
    model: Any, directory: Path, info: Mapping[str, Any] | None = None, extra: dict[str, Any] | None = None
) -> None:
    """Write ``kore.json`` beside the files that PEFT wrote into ``directory``, after putting those in one order.

    Args:
        model: The ``PeftModel``; its ``kore_info`` is written where ``info`` is None. A model without it: nothing is.
        directory: Holds PEFT's two files.
        info: What to write in place of ``kore_info``.
        extra: As in :func:`save_adapter`.
    """
    info = getattr(model, "kore_info", None) if info is None else info
    if info is None:
        return
    mark_type(directory, info)
    config = read_json(directory / _CONFIG)
    for key in ("target_modules", "modules_to_save"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    atomic_write(directory / _CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    content = {
        "schema_version": _SCHEMA_VERSION,
        "library_version": __version__,
        **info,
        "extra": extra or {},
        "sha256": {name: file_sha256(directory / name) for name in (_CONFIG, _WEIGHTS)},
    }
    atomic_write(directory / KORE_FILE, json.dumps(content, indent=2) + "\n")


def mark_type(directory: Path, info: Mapping[str, Any] | None) -> None:
    """Put a ``peft_type`` that stock PEFT refuses into ``adapter_config.json``, where the adapter is no plain LoRA."""
    if info is not None and "routing" in info:
        from kore.adapter.routed import ROUTED

        config = {**read_json(directory / _CONFIG), "peft_type": ROUTED}
        atomic_write(directory / _CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def check_mergeable(path: str | os.PathLike[str]) -> None:
    """Raise ConfigError for an adapter whose change of the weights depends on the input."""
    from kore.adapter.routed import CANNOT_MERGE, ROUTED

    if read_json(Path(path) / _CONFIG).get("peft_type") == ROUTED:
        raise ConfigError(f"{path}: {CANNOT_MERGE}")


def load_kore_model(model: nn.Module, path: str | os.PathLike[str], trainable: bool = False) -> PeftModel:
    """Put a saved adapter on its base model.

    Args:
        model: The untouched base model the adapter was made for; its target layers are wrapped.
        path: A directory written by :func:`save_adapter`.
        trainable: Make B and the modules to save trainable, and A where it was trained. What was frozen or constant
            stays so.

    Raises:
        ArtifactError: A file is missing or corrupt; the message names it.
        ModelError: The adapter belongs to another model.
    """
    from peft import PeftModel

    check_unadapted(model)
    check_outside_zero_init()
    directory = Path(path)
    info = read_info(directory)
    check_fingerprint(info["base_fingerprint"], model, f"the adapter {directory}")
    peft_model: Any
    with torch.random.fork_rng(devices=[]):
        if "routing" in info:
            from kore.adapter.routed import load_routed

            peft_model = load_routed(model, directory, info, trainable)
        else:
            peft_model = PeftModel.from_pretrained(model, str(directory), is_trainable=trainable)
    if not trainable:
        peft_model.requires_grad_(False)  # PEFT 0.15 leaves the modules to save trainable
    if info["a_frozen"]:
        freeze_a(peft_model)
    if info.get("constant_halves"):
        freeze_halves(peft_model)
    dropped = ("schema_version", "library_version", "sha256", "extra")
    peft_model.kore_info = {key: value for key, value in info.items() if key not in dropped}
    return peft_model


def load_adapter(model: nn.Module, path: str | os.PathLike[str], trainable: bool = False) -> PeftModel:
    """Put an adapter on its base model: as :func:`load_kore_model` where KORE saved it, else as PEFT loads it.

    Raises:
        ArtifactError: The directory is no adapter, or a file is missing or corrupt; the message names it.
        ModelError: A KORE adapter belongs to another model.
    """
    from peft import PeftModel

    if (Path(path) / KORE_FILE).is_file() or not (Path(path) / _CONFIG).is_file():
        return load_kore_model(model, path, trainable)
    check_unadapted(model)
    try:
        return PeftModel.from_pretrained(model, str(path), is_trainable=trainable)
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ArtifactError(f"{path}: not a PEFT adapter of this model ({first_line})") from error


def read_info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of an adapter's ``kore.json``, after checking the adapter's files against it.

    Raises:
        ArtifactError: A file is missing, corrupt, or of a newer schema; the message names it.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ArtifactError(f"{directory}: no such adapter directory")
    if not (directory / KORE_FILE).is_file():
        raise ArtifactError(
            f"{directory}: not an adapter saved by KORE, it has no {KORE_FILE}; load_adapter loads plain PEFT adapters"
        )
    info = read_json(directory / KORE_FILE)
    if not isinstance(info, dict) or not {"base_fingerprint", "a_frozen", "sha256"} <= info.keys():
        raise ArtifactError(f"{directory / KORE_FILE}: does not describe an adapter; save it again")
    if info.get("schema_version", 0) > _SCHEMA_VERSION:
        raise ArtifactError(f"{directory / KORE_FILE}: its schema is newer than this library; update kore-lmm")
    for name, sha256 in info["sha256"].items():
        if not (directory / name).is_file():
            raise ArtifactError(f"{directory / name}: no such file; save the adapter again")
        if file_sha256(directory / name) != sha256:
            raise ArtifactError(f"{directory / name}: corrupt or changed, its sha256 is not that of {KORE_FILE}")
    return info


def _peft_model(model: Any) -> PeftModel:
    from peft import PeftModel

    while not isinstance(model, PeftModel) and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    if not isinstance(model, PeftModel):
        raise KoreError(f"save_adapter: expected a model with an adapter, got {type(model).__name__}")
    return model
