"""Build the adapter on a model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kore.adapter.compute import compute_factors
from kore.adapter.config import KoreConfig
from kore.adapter.factors import read_weight
from kore.adapter.frozen import freeze_a
from kore.adapter.halves import freeze_halves, start_of_b
from kore.adapter.rank import energy_share, resolve_rank
from kore.adapter.wrap import check_outside_zero_init, check_unadapted, wrap_lora
from kore.covariance import CovarianceSet
from kore.errors import ConfigError
from kore.models import check_fingerprint, model_fingerprint, named_linears, resolve_targets

if TYPE_CHECKING:
    import torch.distributed as dist
    from peft import PeftModel


def get_kore_model(
    model: nn.Module,
    cov: CovarianceSet | None,
    config: KoreConfig,
    *,
    progress: bool = True,
    distributed: dist.ProcessGroup | bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> PeftModel:
    """Put a KORE adapter on a model: y = W0 x + B A x, A (r, d_in) in the null space of old inputs (arXiv 2510.19316).

    This is the paper's W0' + BA, with W0' = W0 − B₀A, in its zero-residual form: with A frozen and no weight
    decay W0 − B₀A + BA = W0 + (B − B₀)A, so training B from zero on the untouched W0 takes the same steps. The
    adapter is a stock PEFT LoRA with ``lora_alpha = r`` (scaling 1). A stays frozen, see
    :class:`kore.adapter.FrozenLinear`. With ``config.train_a`` the LoRA has rank 2r and one half of it is constant,
    see :class:`kore.adapter.HalfFrozenLinear`. Null spaces, A and the first B are computed in float64, where the
    layer's weight lies.

    One null space is solved for each input that layers share, and one thin SVD for each layer, input after input.
    Peak memory beside the model and the factors A: the widest covariance and what :func:`kore.null_space` needs for it,
    with the randomized solver less than 3 times that covariance in float64 (measured: 2.7 times at d_in = 2752, r = 64,
    on a CPU); after it is freed, U and 4 MiB of W0 in float64. Sharded weights (FSDP2,
    DeepSpeed ZeRO-3) are gathered layer by layer; besides, the whole weights of the layers of one input are held in
    their own dtype.

    Args:
        model: The base model, without adapters. Its weights are not changed; its target layers are wrapped.
        cov: Covariances captured on this model; None only with ``constraint="none"``.
        config: What to make.
        progress: Show a progress bar on an interactive terminal, with the time that is left.
        distributed: The processes that share the inputs between them: None for all processes of
            ``torch.distributed`` where it is initialised, a process group, or False for this process alone. All
            give the same model and covariances, and all get the same adapter, to the bit the one that a process
            computes alone with as many threads.
        checkpoint: A folder that keeps the factors of each finished input, from which a repeated call goes on; delete
            it when the adapter is saved. None keeps nothing.

    Returns:
        The ``PeftModel``, B and the modules to save trainable, all else frozen. What was computed for each layer
        is in its ``kore_info``, which :func:`save_adapter` writes.

    Raises:
        ModelError: The covariance belongs to another model, the model has an adapter, or the call is made inside
            ``deepspeed.zero.Init``.
        ConfigError: The rank is larger than d_in of a layer, or a module name is wrong.
        KoreError: A layer has no covariance, or one that is not finite; or the checkpoint is of something else.
    """
    check_unadapted(model)
    check_outside_zero_init()
    if config.constraint == "null_space" and cov is None:
        raise ConfigError('get_kore_model: constraint="null_space" needs a covariance; capture one first')
    if cov is not None:
        check_fingerprint(cov.fingerprint, model, "the covariance")
    names = resolve_targets(model, config.targets)
    if energy_share(config.rank) is not None and config.constraint == "null_space":
        rank = None
    else:
        rank = resolve_rank(model, names, config.rank, config.train_a)
    fingerprint = model_fingerprint(model)
    factors, notes = compute_factors(
        model,
        names,
        rank,
        cov,
        config,
        fingerprint,
        progress=progress,
        distributed=distributed,
        checkpoint=checkpoint,
    )
    ranks = {name: factor.shape[0] for name, factor in factors.items()}
    starts = dict(_starts_of_b(model, factors)) if config.train_a else {}
    widths = {name: 2 * r for name, r in ranks.items()} if config.train_a else ranks
    peft_model: Any = wrap_lora(model, names, widths, None, config.modules_to_save, config.seed)
    base = peft_model.get_base_model()
    with torch.no_grad():
        for name, A in factors.items():
            layer = base.get_submodule(name)
            layer.lora_A["default"].weight.copy_(torch.cat([A, A]) if config.train_a else A)
            if config.train_a:
                B = starts.pop(name)
                layer.lora_B["default"].weight.copy_(torch.cat([B, -B], dim=1))
    freeze_halves(peft_model) if config.train_a else freeze_a(peft_model)
    peft_model.kore_info = {
        "method": "kore" if config.constraint == "null_space" else "random-a",
        "a_frozen": not config.train_a,
        "constant_halves": config.train_a,
        "rank": ranks if rank is None else rank,
        "config": asdict(config),
        "base_fingerprint": fingerprint,
        "covariance": None if cov is None or config.constraint == "none" else cov.origin(),
        "null_spaces": notes,
    }
    return peft_model


def _starts_of_b(model: nn.Module, factors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """B0 (d_out, r) of every layer on the CPU, in the dtype of its A. Sharded weights are gathered one by one."""
    linears = named_linears(model)
    for name, A in factors.items():
        weight = read_weight(name, linears[name])
        yield name, start_of_b(weight, A).to("cpu", A.dtype)
