"""Put a stock PEFT LoRA on exactly the layers that are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kore.adapter.targets import peft_modules_to_save, peft_target_modules
from kore.errors import ModelError
from kore.models import named_linears

if TYPE_CHECKING:
    from peft import PeftModel


def check_unadapted(model: nn.Module) -> None:
    """Raise ModelError for a model that carries a PEFT adapter already."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ModelError("expected a base model, got one with an adapter; merge or unload the adapter first")


def wrap_lora(
    model: nn.Module,
    names: Sequence[str],
    rank: int,
    lora_alpha: int,
    modules_to_save: str | Sequence[str] | None,
    seed: int,
) -> PeftModel:
    """A PeftModel with a LoRA without dropout on the layers ``names``: B zero, A by PEFT's rule from ``seed``.

    The base weights are not touched, nor is the random state of the caller.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    linears: dict[str, Any] = named_linears(model)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=lora_alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=peft_target_modules(model, names),
        modules_to_save=peft_modules_to_save(model, modules_to_save, names) or None,
        fan_in_fan_out=all(isinstance(linears[name], Conv1D) for name in names),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)
