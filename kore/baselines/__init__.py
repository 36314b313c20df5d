"""The methods KORE is compared with, one file each, all used in the same way.

Which model is trained (``prepare``), on which data (``conversations``), and what is added to the loss (``penalty``):
see :class:`Baseline`. Formulas, units and options are in the class of each method.

===============  ============================  =================================  ==================================
method           trained                       stored beside, while it trains     source
===============  ============================  =================================  ==================================
``kore``         B, projector                  –                                  arXiv 2510.19316
``random-a``     B, projector                  –                                  LoRA-FA, arXiv 2308.03303
``lora-null-v1`` A, B, projector               a constant half of the factors     arXiv 2503.02659
``lora-null-v2`` B, projector                  –                                  arXiv 2503.02659
``lora``         A, B, projector               –                                  arXiv 2106.09685
``full``         language model, projector     –                                  LLaVA, arXiv 2304.08485
``replay``       A, B, projector; on old data  –                                  arXiv 1811.11682
``ewc``          A, B, projector               Fisher information and the start   arXiv 1612.00796
``ewc-full``     language model, projector     Fisher information and the start   arXiv 1612.00796
``lwf``          A, B, projector               – (a second forward pass)          arXiv 1606.09282
``moelora``      experts' A, B and routers,    –                                  CoIN, arXiv 2403.08350
                 projector
``o-lora``       A, B, projector               A of the task before               arXiv 2310.14152
``sefe``         A, B, projector; on more      2 % of the places in the weights   arXiv 2505.02486
                 styles of the data
``cia``          A, B, projector               their moving average, a gradient   arXiv 2410.10868
===============  ============================  =================================  ==================================

At one rank the methods that train A and B have one number of trained parameters; ``match-lora-R`` gives it to a frozen
A as well. Old conversations: ``replay`` trains on some, ``ewc`` measures on them, ``o-lora`` and ``sefe`` train the
adapter of the task before on them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kore.baselines.base import Baseline, Preparation
from kore.baselines.cia import CIA
from kore.baselines.ewc import EWC, FullEWC
from kore.baselines.full import FullFineTuning
from kore.baselines.lora import LoRA
from kore.baselines.lwf import LwF
from kore.baselines.moelora import MoELoRA
from kore.baselines.null_space import Kore, LoRANull1, LoRANull2, RandomA
from kore.baselines.o_lora import OLoRA
from kore.baselines.replay import Replay
from kore.baselines.sefe import SEFE
from kore.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from kore.covariance import CovarianceSet

__all__ = ["BASELINES", "METHODS", "NULL_SPACE", "Baseline", "Preparation", "baseline", "baseline_of", "prepare_model"]

_KINDS: tuple[type[Baseline], ...] = (
    *(Kore, LoRA, FullFineTuning, RandomA, LoRANull1, LoRANull2),
    *(Replay, EWC, FullEWC, LwF),
    *(MoELoRA, OLoRA, SEFE, CIA),
)
BASELINES: Mapping[str, type[Baseline]] = MappingProxyType({kind.method: kind for kind in _KINDS})
METHODS = tuple(BASELINES)
NULL_SPACE = tuple(name for name, kind in BASELINES.items() if kind.reads_covariance)
"""The methods that need a covariance."""


def baseline(method: str, **options: Any) -> Baseline:
    """The method of this name. Raises ConfigError where there is none, or it has no such option."""
    if method not in BASELINES:
        raise ConfigError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    return BASELINES[method](**options)


def baseline_of(adapter: str | os.PathLike[str]) -> Baseline:
    """The method that made an adapter, with its options, as ``kore.json`` says; of a plain PEFT adapter, LoRA.

    Raises:
        ConfigError: It was made by a method that this version does not have.
        ArtifactError: Its ``kore.json`` cannot be read.
    """
    from kore.adapter.files import KORE_FILE
    from kore.artifacts import read_json

    file = Path(adapter) / KORE_FILE
    info = read_json(file) if file.is_file() else {}
    return baseline(info.get("method", LoRA.method), **info.get("options", {}))


def prepare_model(
    model: nn.Module,
    method: str,
    cov: CovarianceSet | None = None,
    *,
    options: Mapping[str, Any] | None = None,
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
    """Make a model trainable by a method; what is trained, its class in :data:`BASELINES` says.

    All adapters sit on the same layers and train ``modules_to_save`` too.

    Args:
        model: The base model, without adapters. ``"full"`` sets its flags in place and returns it.
        method: One of :data:`METHODS`.
        cov: For the methods in :data:`NULL_SPACE`.
        options: The method's own hyper-parameters, by name.
        rank: Of the adapter: a number, or ``"match-lora-R"``, which is R itself where A is trained, and ``"energy:τ"``
            for methods with a covariance, as in :class:`kore.KoreConfig`. Not for methods that train in full.
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
    chosen = baseline(method, **(options or {}))
    check_options(method, scale, train_a, strength)
    how = Preparation(
        cov=cov,
        rank=rank,
        targets=targets,
        modules_to_save=modules_to_save,
        seed=seed,
        scale=scale,
        solver=solver,
        train_a=train_a,
        strength=strength,
        lora_alpha=lora_alpha,
        progress=progress,
        checkpoint=checkpoint,
    )
    return chosen.prepare(model, how)


def check_options(method: str, scale: str = "sqrt", train_a: bool = False, strength: float = 1.0) -> None:
    """Raise ConfigError for an unknown method, and for options of KORE that another method does not have."""
    baseline(method)
    if method == Kore.method:
        return
    if train_a:
        hint = "; lora-null-v1 trains A" if method == LoRANull2.method else ""
        raise ConfigError(f"train_a: expected false for method {method}, whose A is as its name says{hint}")
    if strength != 1:
        raise ConfigError(f"strength: expected 1 for method {method}, got {strength}; it is an option of method kore")
    if method.startswith("lora-null") and scale != "sqrt":
        raise ConfigError(f"scale: expected sqrt for method {method}, got {scale!r}; method kore has other scales")
