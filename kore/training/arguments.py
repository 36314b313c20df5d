"""From a TrainConfig to Hugging Face TrainingArguments, over the versions KORE supports."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kore.errors import ConfigError
from kore.training.config import TrainConfig

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments


def training_arguments(config: TrainConfig, output_dir: Path, model: nn.Module) -> TrainingArguments:
    """Build the arguments. Starts torch.distributed under torchrun.

    Raises:
        ConfigError: The machine, the installed transformers or DeepSpeed cannot do what the configuration asks.
    """
    import torch
    from transformers import TrainingArguments

    sharded = bool(config.deepspeed or config.fsdp)
    on_cpu = not torch.cuda.is_available() or (next(model.parameters()).device.type == "cpu" and not sharded)
    workers = config.dataloader_workers
    values: dict[str, Any] = {
        "output_dir": str(output_dir),
        "learning_rate": config.learning_rate,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "lr_scheduler_type": config.scheduler,
        "optim": config.optimizer,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "bf16": _bf16(config, on_cpu),
        "seed": config.seed,
        "dataloader_num_workers": (0 if on_cpu else 4) if workers == "auto" else workers,
        "logging_steps": config.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if config.save_steps else "no",
        "save_steps": config.save_steps or 500,
        "report_to": config.report_to,
        "disable_tqdm": not config.progress,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "ddp_find_unused_parameters": False,
        "average_tokens_across_devices": True,
        "use_cpu": on_cpu,
    }
    for name in ("deepspeed", "fsdp", "fsdp_config"):
        if getattr(config, name) is not None:
            values[name] = getattr(config, name)
    known = inspect.signature(TrainingArguments).parameters
    unknown = sorted(set(config.trainer_arguments) - set(known))
    if unknown:
        raise ConfigError(f"trainer_arguments: {', '.join(unknown)}: no such field of TrainingArguments")
    try:
        arguments = TrainingArguments(**{**values, **config.trainer_arguments})
        arguments.device  # noqa: B018  reading it starts torch.distributed
    except (ImportError, ValueError, TypeError) as error:
        raise ConfigError(f"training cannot start with this configuration: {error}") from error
    if not sharded:
        arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _bf16(config: TrainConfig, on_cpu: bool) -> bool:
    import torch

    if config.bf16 == "auto":
        return not on_cpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(config.bf16)
