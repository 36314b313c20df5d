"""Build the adapter on a model."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kore.adapter.config import KoreConfig
from kore.adapter.factors import compute_factors
from kore.adapter.frozen import freeze_a
from kore.adapter.rank import resolve_rank
from kore.adapter.wrap import check_unadapted, wrap_lora
from kore.covariance import CovarianceSet
from kore.errors import ConfigError
from kore.models import check_fingerprint, model_fingerprint, resolve_targets

if TYPE_CHECKING:
    from peft import PeftModel


def get_kore_model(
    model: nn.Module, cov: CovarianceSet | None, config: KoreConfig, *, progress: bool = True
) -> PeftModel:
    """Put a KORE adapter on a model: y = W0 x + B A x, A (r, d_in) in the null space of old inputs (arXiv 2510.19316).

    This is the paper's W0' + BA, with W0' = W0 − B₀A, in its zero-residual form: with A frozen and no weight
    decay W0 − B₀A + BA = W0 + (B − B₀)A, so training B from zero on the untouched W0 takes the same steps. The
    adapter is a stock PEFT LoRA with ``lora_alpha = r`` (scaling 1). A stays frozen, see
    :class:`kore.adapter.FrozenLinear`. Null spaces and A are computed in float64.

    Args:
        model: The base model, without adapters. Its weights are not changed; its target layers are wrapped.
        cov: Covariances captured on this model; None only with ``constraint="none"``.
        config: What to make.
        progress: Show a progress bar on an interactive terminal.

    Returns:
        The ``PeftModel``, B and the modules to save trainable, all else frozen. What was computed for each layer
        is in its ``kore_info``, which :func:`save_adapter` writes.

    Raises:
        ModelError: The covariance belongs to another model, or the model has an adapter.
        ConfigError: The rank is larger than d_in of a layer, or a module name is wrong.
        KoreError: A layer has no covariance, or one that is not finite.
    """
    check_unadapted(model)
    if config.constraint == "null_space" and cov is None:
        raise ConfigError('get_kore_model: constraint="null_space" needs a covariance; capture one first')
    if cov is not None:
        check_fingerprint(cov.fingerprint, model, "the covariance")
    names = resolve_targets(model, config.targets)
    rank = resolve_rank(model, names, config.rank)
    fingerprint = model_fingerprint(model)
    factors, notes = compute_factors(model, names, rank, cov, config, progress)
    peft_model: Any = wrap_lora(model, names, rank, rank, config.modules_to_save, config.seed)
    base = peft_model.get_base_model()
    with torch.no_grad():
        for name, factor in factors.items():
            base.get_submodule(name).lora_A["default"].weight.copy_(factor)
    freeze_a(peft_model)
    peft_model.kore_info = {
        "method": "kore" if config.constraint == "null_space" else "random-a",
        "a_frozen": True,
        "rank": rank,
        "config": asdict(config),
        "base_fingerprint": fingerprint,
        "normalize": None if cov is None else cov.normalize,
        "null_spaces": notes,
    }
    return peft_model
