"""Merging an adapter into its base model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from kore.artifacts import MANIFEST, atomic_directory
from kore.errors import ArtifactError, ConfigError
from kore.models import load_model

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


def merge(
    model_path: str | os.PathLike[str],
    adapter_path: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device: str = "cpu",
) -> Path:
    """Write the model with the adapter merged in: W0 + s·B·A for every adapted layer, biases kept, and the
    adapter's fully trained modules (the projector) in place of the base's.

    The result is a plain Hugging Face model directory with the base's tokenizer, chat template, image processor
    and generation settings. It appears at ``output_dir`` whole or not at all.

    Args:
        model_path: The untouched base model, a directory or a hub id.
        adapter_path: A KORE or stock PEFT LoRA adapter directory.
        output_dir: Where the merged model goes; an earlier one there is replaced.
        dtype: Dtype of the merged weights, by default the base checkpoint's.
        device: Where the merge is computed.

    Raises:
        ModelError: The base cannot be loaded, or the adapter was made for another model.
        ConfigError: The adapter is of routed experts, whose change depends on the input.
        ArtifactError: The adapter is missing or broken.
    """
    from kore.adapter import load_adapter
    from kore.adapter.files import check_mergeable
    from kore.data.encoder import Encoder

    output = Path(output_dir)
    for name, path in (("model_path", Path(model_path)), ("adapter_path", Path(adapter_path))):
        if path.exists() and output.exists() and path.samefile(output):
            raise ConfigError(f"output_dir {output} is also {name}; choose another directory for the merged model")
    if not (Path(adapter_path) / "adapter_config.json").is_file():
        raise ArtifactError(f"{adapter_path}: not an adapter directory, it has no adapter_config.json")
    check_mergeable(adapter_path)
    model = load_adapter(load_model(model_path, dtype=dtype, device=device), adapter_path)
    merged: Any = model.merge_and_unload()
    with atomic_directory(output) as directory:
        if Path(model_path).is_dir():
            copy_settings(Path(model_path), directory)
        else:
            Encoder.from_pretrained(model_path).save_pretrained(directory)
        merged.save_pretrained(directory)
    return output


def copy_settings(source: Path, target: Path) -> None:
    """Copy every file beside the weights as it is: tokenizer, chat template, processors, remote code."""
    for entry in source.iterdir():
        ours = entry.name == MANIFEST or entry.name.startswith(".")
        if entry.is_file() and not entry.name.endswith(_WEIGHTS) and not ours:
            shutil.copy2(entry, target / entry.name)
