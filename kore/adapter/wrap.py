"""Put a stock PEFT LoRA on exactly the layers that are wanted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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


def check_outside_zero_init() -> None:
    """Raise ModelError inside ``deepspeed.zero.Init``, which partitions every layer as soon as it is made."""
    if hasattr(nn.LayerNorm(1).weight, "ds_id"):
        raise ModelError(
            "expected to be called outside deepspeed.zero.Init, which would take the adapter's layers apart before "
            "their values are written; call it after that block (the base model may be partitioned)"
        )


def check_whole(model: nn.Module) -> None:
    """Raise ModelError where DeepSpeed ZeRO-3 holds trainable parameters or LoRA factors in parts."""
    for name, parameter in model.named_parameters():
        partitioned = hasattr(parameter, "ds_id") and parameter.numel() == 0
        if partitioned and (parameter.requires_grad or ".lora_" in name):
            raise ModelError(
                f"{name} is partitioned by DeepSpeed ZeRO-3, so its values are not here; on all processes, make the "
                'call in deepspeed.zero.GatheredParameters([p for n, p in model.named_parameters() if ".lora_" in n])'
            )


def wrap_lora(
    model: nn.Module,
    names: Sequence[str],
    rank: int | Mapping[str, int],
    lora_alpha: int | None,
    modules_to_save: str | Sequence[str] | None,
    seed: int,
    layer: type[nn.Module] | None = None,
) -> PeftModel:
    """A PeftModel with a LoRA without dropout on the layers ``names``: B zero, A by PEFT's rule from ``seed``.

    The base weights are not touched, nor is the random state of the caller.

    Args:
        model: The base model.
        names: The layers.
        rank: r, or r by layer: the commonest in PEFT's ``r``, the others in its ``rank_pattern``.
        lora_alpha: None for r of each layer, so that all scale by 1.
        modules_to_save: As in :class:`kore.KoreConfig`.
        seed: Of A.
        layer: A subclass of PEFT's ``lora.Linear`` to take in its place.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    linears: dict[str, Any] = named_linears(model)
    ranks = {name: rank if isinstance(rank, int) else rank[name] for name in names}
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {_pattern_key(name, linears): r for name, r in ranks.items() if r != common}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=common,
        lora_alpha=common if lora_alpha is None else lora_alpha,
        rank_pattern=others,
        alpha_pattern=dict(others) if lora_alpha is None else {},
        lora_dropout=0.0,
        bias="none",
        target_modules=peft_target_modules(model, names),
        modules_to_save=peft_modules_to_save(model, modules_to_save, names) or None,
        fan_in_fan_out=all(isinstance(linears[name], Conv1D) for name in names),
    )
    if layer is not None:
        config._register_custom_module({nn.Linear: layer})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def _pattern_key(name: str, names: Iterable[str]) -> str:
    """A key of ``rank_pattern`` for one layer. PEFT takes it for an expression that may match the end of a name."""
    return f"^{name}" if any(other.endswith(f".{name}") for other in names) else name
