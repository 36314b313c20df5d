"""The methods KORE is compared with, each as one call that leaves the right parameters trainable."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from kore.adapter import KoreConfig, get_kore_model, resolve_rank
from kore.adapter.wrap import check_unadapted, wrap_lora
from kore.covariance import CovarianceSet
from kore.errors import ConfigError
from kore.models import has_vision, language_model_linears, model_fingerprint, projector_name, resolve_targets

METHODS = ("kore", "lora", "full", "random-a", "lora-null-v1", "lora-null-v2")
NULL_SPACE = ("kore", "lora-null-v1", "lora-null-v2")
"""The methods that need a covariance."""


def prepare_model(
    model: nn.Module,
    method: str,
    cov: CovarianceSet | None = None,
    *,
    rank: int | str | None = None,
    targets: str | Sequence[str] | None = None,
    modules_to_save: str | Sequence[str] | None = "auto",
    seed: int = 0,
    scale: str = "sqrt",
    solver: str = "auto",
    train_a: bool = False,
    strength: float = 1.0,
    lora_alpha: int | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Make a model trainable by a method.

    ==================  ==============================================================================================
    method              what is trained
    ==================  ==============================================================================================
    ``"kore"``          B; A is frozen in the null space of ``cov``. With ``train_a`` both, from the paper's A0 and B0
    ``"lora-null-v2"``  B; the adapter of ``"kore"``, to the bit
    ``"lora-null-v1"``  A and B; the adapter of ``"kore"`` with ``train_a``, to the bit
    ``"random-a"``      B; A is frozen in a random subspace, its scale computed as KORE's
    ``"lora"``          A and B of a LoRA without dropout, A by PEFT's rule, ``lora_alpha`` 2 · rank unless given
    ``"full"``          every parameter of the language model with its embeddings and output head, and the projector;
                        not the vision tower. A text-only model: every parameter
    ==================  ==============================================================================================

    All adapters sit on the same layers and train ``modules_to_save`` too.

    LoRA-Null (Tang et al. 2025, arXiv 2503.02659) has KORE's initialisation, KORE's code being derived from its: U from
    the r smallest singular values of C, svd(W0 U Uᵀ) = U* Σ V*ᵀ, B0 = U* √Σ, A0 = √Σ V*ᵀ. Its version 1 trains both
    factors, its version 2 freezes A. What sets it apart is outside this function: C is of text alone, 256 sequences of
    NQ-open questions with every token counted (``tokens="all"``), rows scaled by 1 / |max x| of their sequence
    (``normalize="official"``, as in KORE's code); there is no projector to train; rank 128 and learning rate 2e-5. Its
    code also trains the biases of adapted layers, which the Llama models it is for do not have; here they stay.

    Args:
        model: The base model, without adapters. ``"full"`` sets its flags in place and returns it.
        method: One of :data:`METHODS`.
        cov: For ``"kore"`` and LoRA-Null.
        rank: Of the adapter, a number; ``"match-lora-R"`` also, for the methods with a frozen A, and ``"energy:τ"``
            for those with a covariance, as in :class:`kore.KoreConfig`. Not for ``"full"``.
        targets: The adapted layers, as in :class:`kore.KoreConfig`.
        modules_to_save: Modules trained in full beside the adapter, by default the projector.
        seed: Of A.
        scale: Row lengths of A, except of ``"lora"``; ``"sqrt"`` for LoRA-Null.
        solver: Of the null space.
        train_a: For ``"kore"``, as in :class:`kore.KoreConfig`.
        strength: For ``"kore"``, as in :class:`kore.KoreConfig`.
        lora_alpha: For ``"lora"``.
        progress: Show a progress bar on an interactive terminal.
        checkpoint: A folder that keeps what is finished of a frozen A, see :func:`kore.get_kore_model`.

    Raises:
        ConfigError: The method is unknown, its rank or covariance is missing, or an option is not for it.
    """
    check_options(method, scale, train_a, strength)
    if method == "full":
        check_unadapted(model)
        return _train_in_full(model)
    if rank is None:
        raise ConfigError(f"rank: expected a number for method {method!r}, got none")
    if method == "lora":
        if isinstance(rank, str):
            raise ConfigError(f"rank: expected a number for method 'lora', got {rank!r}")
        return _lora(model, rank, targets, modules_to_save, seed, lora_alpha)
    config = KoreConfig(
        rank=rank,
        targets=targets,
        modules_to_save=modules_to_save,
        scale=scale,
        constraint="null_space" if method in NULL_SPACE else "none",
        solver=solver,
        seed=seed,
        train_a=train_a or method == "lora-null-v1",
        strength=strength,
    )
    peft_model: Any = get_kore_model(model, cov, config, progress=progress, checkpoint=checkpoint)
    peft_model.kore_info["method"] = method
    return peft_model


def check_options(method: str, scale: str = "sqrt", train_a: bool = False, strength: float = 1.0) -> None:
    """Raise ConfigError for an unknown method, and for options of KORE that another method does not have."""
    if method not in METHODS:
        raise ConfigError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if method == "kore":
        return
    if train_a:
        hint = "; lora-null-v1 trains A" if method == "lora-null-v2" else ""
        raise ConfigError(f"train_a: expected false for method {method}, whose A is as its name says{hint}")
    if strength != 1:
        raise ConfigError(f"strength: expected 1 for method {method}, got {strength}; it is an option of method kore")
    if method.startswith("lora-null") and scale != "sqrt":
        raise ConfigError(f"scale: expected sqrt for method {method}, got {scale!r}; method kore has other scales")


def _lora(
    model: nn.Module,
    rank: int,
    targets: str | Sequence[str] | None,
    modules_to_save: str | Sequence[str] | None,
    seed: int,
    lora_alpha: int | None,
) -> nn.Module:
    check_unadapted(model)
    names = resolve_targets(model, targets)
    rank = resolve_rank(model, names, rank)
    fingerprint = model_fingerprint(model)
    alpha = 2 * rank if lora_alpha is None else lora_alpha
    peft_model: Any = wrap_lora(model, names, rank, alpha, modules_to_save, seed)
    peft_model.kore_info = {
        "method": "lora",
        "a_frozen": False,
        "rank": rank,
        "config": {
            "rank": rank,
            "lora_alpha": alpha,
            "targets": targets,
            "modules_to_save": modules_to_save,
            "seed": seed,
        },
        "base_fingerprint": fingerprint,
    }
    return peft_model


def _train_in_full(model: Any) -> nn.Module:
    if not has_vision(model):
        return model.requires_grad_(True)
    model.requires_grad_(False)
    layers = os.path.commonpath([name.replace(".", "/") for name in language_model_linears(model)]).replace("/", ".")
    trained = [model.get_submodule(layers.rpartition(".")[0])]
    trained += [model.get_input_embeddings(), model.get_output_embeddings()]
    projector = projector_name(model)
    if projector is not None:
        trained.append(model.get_submodule(projector))
    for module in trained:
        if module is not None:
            module.requires_grad_(True)
    return model
