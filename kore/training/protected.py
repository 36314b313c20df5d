"""What a penalty on the loss needs from a training run: whether its weights are sharded, and how strong it shall be."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kore.artifacts import atomic_write, read_json
from kore.data.encoder import Encoder
from kore.errors import ConfigError
from kore.training.config import TrainConfig
from kore.training.dataset import TrainingSet

if TYPE_CHECKING:
    from torch import nn

    from kore.protection import TwoSided

logger = logging.getLogger(__name__)

STRENGTH = "protection.json"
_SAMPLES = 256


def check_sharding(config: TrainConfig) -> None:
    """Raise ConfigError where the weights are split in a way that hides B from a penalty: FSDP1 and ZeRO-3."""
    if config.fsdp and _fsdp_version(config) != 2:
        raise ConfigError(
            "protection: FSDP1 (fsdp) is not supported, its weights are flattened; "
            "set fsdp_config: {fsdp_version: 2}, or train data-parallel"
        )
    if config.deepspeed and _zero_stage(config) >= 3:
        raise ConfigError(
            "protection: DeepSpeed ZeRO-3 (deepspeed) is not supported, it holds B only while its layer runs; "
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


def settle(
    protection: TwoSided, model: nn.Module, encoder: Encoder, examples: TrainingSet, batch_size: int, output_dir: Path
) -> None:
    """Give a penalty with the strength ``"auto"`` its λ, the same in every process and in every resumed run."""
    import torch.distributed as dist

    if protection.settings()["strength"] != "auto":
        return
    file = output_dir / STRENGTH
    processes = dist.is_available() and dist.is_initialized()
    rank = dist.get_rank() if processes else 0
    kept = file.is_file()
    if processes:
        dist.barrier()
    if kept:
        loss = float(read_json(file)["loss"])
    else:
        loss = untouched_loss(model, encoder, examples, batch_size)
    strength = protection.settle(loss)
    if not kept and rank == 0:
        about = {**protection.settings(), "strength": strength, "loss": loss}
        atomic_write(file, json.dumps(about, indent=1) + "\n")
    if rank == 0:
        logger.info("protection: λ = %.4g, from a loss of %.4g on the new answers before training", strength, loss)


def untouched_loss(model: nn.Module, encoder: Encoder, examples: TrainingSet, batch_size: int) -> float:
    """L0: mean −log p over the answer tokens of up to 256 evenly spaced examples, adapters off.

    The processes of ``torch.distributed`` share the examples and all get the mean over all of them.
    """
    import torch
    import torch.distributed as dist

    from kore.training.trainer import batch_loss, selects_logits

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
                total += float(batch_loss(model, batch, 1, selects_logits(model))[0])
                tokens += int((batch["labels"][:, 1:] != -100).sum())
    finally:
        model.train(training)
    if processes:
        shared: Any = [None] * world
        dist.all_gather_object(shared, (total, tokens))
        total, tokens = (sum(part[index] for part in shared) for index in range(2))
    return total / tokens
