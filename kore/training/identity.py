"""What a training run depends on, so that it is resumed only where the result would be the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kore.artifacts import atomic_write, read_json
from kore.data.encoder import Encoder
from kore.data.types import Conversation
from kore.errors import ConfigError
from kore.models import model_fingerprint
from kore.training.config import TrainConfig

if TYPE_CHECKING:
    from torch import nn

RUN = "run.json"
_SAMPLES = 64


def run_identity(
    model: nn.Module, encoder: Encoder, conversations: Sequence[Conversation], config: TrainConfig, processes: int
) -> dict[str, Any]:
    """The run's configuration and short hashes of its data, base model and starting weights."""
    return {
        "config": config.identity(),
        "processes": processes,
        "data": hash_data(conversations, encoder),
        "model": model_fingerprint(model),
        "start": _hash_trained(model),
    }


def hash_data(conversations: Sequence[Conversation], encoder: Encoder) -> str:
    """Tells these conversations, as the encoder shows them to the model, from others."""
    digest = hashlib.sha256(str(encoder.chat_template).encode())
    for item in conversations:
        images = [(path.name, path.stat().st_size) for path in item.images]
        turns = [(message.role, message.text) for message in item.messages]
        digest.update(json.dumps([item.id, images, turns]).encode())
    return digest.hexdigest()


def _hash_trained(model: nn.Module) -> str:
    """Hash of names, shapes and samples of the trained parameters and of frozen adapter factors."""
    import torch

    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not (parameter.requires_grad or "lora_" in name):
            continue
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.requires_grad}".encode())
        values = parameter.detach().flatten()
        index = torch.linspace(0, max(values.numel() - 1, 0), min(_SAMPLES, values.numel())).long()
        digest.update(values[index.to(values.device)].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def check_identity(output_dir: Path, identity: dict[str, Any]) -> bool:
    """Whether ``output_dir`` holds a run of this identity.

    Raises:
        ConfigError: It holds another run; the message says what differs.
    """
    if not (output_dir / RUN).is_file():
        return False
    found = read_json(output_dir / RUN)
    if found == identity:
        return True
    old, new = (_flat(value) for value in (found, identity))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    texts = [
        f"{name} was {old.get(name)!r}, is {new.get(name)!r}" if name.startswith("config.") else f"other {name}"
        for name in names
    ]
    raise ConfigError(
        f"{output_dir} holds a training run that differs ({'; '.join(texts)}); "
        "choose another output directory, or resume=False to start over"
    )


def write_identity(output_dir: Path, identity: dict[str, Any]) -> None:
    """Record what the run in ``output_dir`` depends on."""
    atomic_write(output_dir / RUN, json.dumps(identity, indent=1) + "\n")


def _flat(value: dict[str, Any]) -> dict[str, Any]:
    config = {f"config.{name}": item for name, item in value.get("config", {}).items()}
    return {**config, **{name: item for name, item in value.items() if name != "config"}}
