"""A base model whose weights stay in its files until they are looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from kore.artifacts import read_json
from kore.errors import ModelError
from kore.official.checkpoint import Checkpoint
from kore.official.names import by_role


def read_settings(directory: Path) -> dict[str, Any]:
    """The ``config.json`` of a model directory."""
    if not directory.is_dir():
        raise ModelError(f"{directory}: no such model directory; a model of the hub must be downloaded first")
    settings = read_json(directory / "config.json")
    if not isinstance(settings, dict):
        raise ModelError(f"{directory / 'config.json'}: expected a JSON object")
    return settings


def is_original_llava(settings: dict[str, Any]) -> bool:
    """Whether the settings are those of the original LLaVA repository, not of the Hugging Face class."""
    return "mm_projector_type" in settings or "mm_vision_tower" in settings


def lazy_model(directory: Path) -> Any:
    """The Hugging Face model of a directory, its parameters memory-mapped from its files. Not for computing.

    Raises:
        ModelError: The model is of another library, or its files lack a weight or have one of another shape.
    """
    import transformers

    settings = read_settings(directory)
    if is_original_llava(settings):
        raise ModelError(
            f"{directory}: a checkpoint of the original LLaVA repository; PEFT adapters go on the Hugging Face form of "
            "the same model, for example llava-hf/llava-1.5-7b-hf: give that"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(str(directory))
        vision = getattr(config, "vision_config", None) is not None
        auto: Any = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
        with torch.device("meta"):
            model: Any = auto.from_config(config)
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{directory}: not a model that transformers can build ({first_line})") from error
    checkpoint, parameters = Checkpoint(directory), dict(model.named_parameters())
    for role, name in by_role(parameters, str(directory)).items():
        stored = checkpoint.roles.get(role)
        if stored is None:
            raise ModelError(f"{directory}: its files have no {name}; the checkpoint is incomplete")
        tensor = checkpoint[stored]
        if tensor.shape != parameters[name].shape:
            raise ModelError(
                f"{directory}: {stored} is {tuple(tensor.shape)}, its config.json makes {tuple(parameters[name].shape)}"
            )
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))
    model.tie_weights()
    model.name_or_path = str(directory)
    return model.eval()
