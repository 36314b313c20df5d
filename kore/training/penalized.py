"""What a penalty needs from a training run: whole weights, and the loss it starts from."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kore.artifacts import read_json
from kore.data.encoder import Encoder
from kore.errors import ConfigError
from kore.training.config import TrainConfig
from kore.training.dataset import TrainingSet

if TYPE_CHECKING:
    from torch import nn

_SAMPLES = 256


def check_sharding(config: TrainConfig, reads_gradients: bool = False) -> None:
    """Raise ConfigError where the weights are split in a way that hides them from a penalty: FSDP1 and ZeRO-3.

    One that ``reads_gradients`` can do with no split at all.
    """
    if reads_gradients and (config.fsdp or config.deepspeed):
        raise ConfigError(
            f"{'fsdp' if config.fsdp else 'deepspeed'}: this method reads whole gradients; train data-parallel instead"
        )
    if config.fsdp and _fsdp_version(config) != 2:
        raise ConfigError(
            "a penalty: FSDP1 (fsdp) is not supported, its weights are flattened; "
            "set fsdp_config: {fsdp_version: 2}, or train data-parallel"
        )
    if config.deepspeed and _zero_stage(config) >= 3:
        raise ConfigError(
            "a penalty: DeepSpeed ZeRO-3 (deepspeed) is not supported, it holds a weight only while its layer runs; "
            "use stage 2 or less, or train data-parallel"
        )


def _fsdp_version(config: TrainConfig) -> int:
    settings = _read(config.fsdp_config)
    return int(settings.get("fsdp_version", settings.get("version", 1)))


def _zero_stage(config: TrainConfig) -> int:
    return int(_read(config.deepspeed).get("zero_optimization", {}).get("stage", 0))


def _read(settings: str | dict[str, Any] | None) -> dict[str, Any]:
    found = read_json(Path(settings)) if isinstance(settings, str) else settings
    return found or {}


def untouched_loss(model: nn.Module, encoder: Encoder, examples: TrainingSet, batch_size: int) -> float:
    """L0: mean −log p over the answer tokens of up to 256 evenly spaced examples, adapters off.

    The processes of ``torch.distributed`` share the examples and all get the mean over all of them.
    """
    import torch
    import torch.distributed as dist

    from kore.training.trainer import answer_loss, forward, selects_logits

    processes = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if processes else (0, 1)
    count = min(_SAMPLES, len(examples))
    chosen = [index * len(examples) // count for index in range(count)][rank::world]
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    adapters_off: Any = model.disable_adapter if hasattr(model, "disable_adapter") else contextlib.nullcontext
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), adapters_off():
            for start in range(0, len(chosen), batch_size):
                batch = encoder.collate([examples[index] for index in chosen[start : start + batch_size]])
                batch = {key: value.to(device) for key, value in batch.items()}
                passed = forward(model, batch, selects_logits(model))
                total += float(answer_loss(passed.logits, passed.targets, 1))
                tokens += int(passed.count)
    finally:
        model.train(training)
    if processes:
        shared: Any = [None] * world
        dist.all_gather_object(shared, (total, tokens))
        total, tokens = (sum(part[index] for part in shared) for index in range(2))
    return total / tokens
