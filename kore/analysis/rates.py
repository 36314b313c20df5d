"""A learning rate for an adapter whose A is quiet: the one whose first steps are as long as a LoRA's."""

from __future__ import annotations

import math
import os
import statistics
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kore.analysis.adapters import Update, read_updates
from kore.covariance import CovarianceSet
from kore.errors import KoreError

_SAME = 1e-3


@dataclass(frozen=True)
class MatchedRate:
    """What :func:`step_matched_rate` found.

    Attributes:
        learning_rate: The median over the layers.
        by_module: The matched rate of each layer, in the adapter's order.
        reference_rate: The LoRA's.
    """

    learning_rate: float
    by_module: dict[str, float]
    reference_rate: float

    @property
    def factor(self) -> float:
        """Over the LoRA's rate."""
        return self.learning_rate / self.reference_rate

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and the largest rate of a layer."""
        return min(self.by_module.values()), max(self.by_module.values())


def step_matched_rate(
    adapter: nn.Module | str | os.PathLike[str] | Mapping[str, Update],
    new: CovarianceSet,
    reference_rate: float = 2e-4,
    reference_rank: int = 128,
    reference_alpha: float | None = None,
    seed: int = 0,
) -> MatchedRate:
    """The learning rate at which an adapter's first steps move its layers' outputs as far as a LoRA's.

    Adam's first step changes every entry of B by the rate η, whatever the size of the gradient. With the signs that
    lower the loss on an input x it moves every output of the layer s·B A x by η · s ‖A x‖₁; while B is 0 the gradient
    of A is 0, so a LoRA with trained A does the same. Their first steps agree at

        η = η₀ · E s₀‖A₀ x‖₁ / E s‖A x‖₁,   E‖A x‖₁ = √(2/π) Σ_i √(a_i C a_iᵀ / tokens),

    the last for centred normal A x; a_i are the rows of A, and A₀ is drawn by PEFT's rule, uniform in ± 1/√d_in. The
    median over the layers is taken. This is an own derivation, and a starting point: it knows nothing of the loss,
    nor of what is forgotten, and a penalty on B (two-sided protection) is not in it.

    x must be inputs of NEW data. The adapter is quiet on old ones by construction, so that C of old data, held out or
    not, gives a rate too high.

    Args:
        adapter: A ``PeftModel``, the directory of a saved adapter, or A and scaling of each module. B is not looked
            at. A has shape (r, d_in); the arithmetic is float64 where C lies.
        new: Covariance of new data, from :func:`kore.capture_covariance` (``capture.new_samples`` of ``kore run``).
        reference_rate: η₀, at which a LoRA learns this data well. The default and the next two are those of LLaVA's
            recipe.
        reference_rank: Of that LoRA.
        reference_alpha: Its ``lora_alpha``, s₀ = alpha / rank; None for 2 · rank.
        seed: Of A₀.

    Raises:
        KoreError: The adapter and the covariance share no layer, or differ in d_in; or a number is wrong; or the
            covariance counts no tokens, or A x = 0 for all of them in every layer; or A is trained from B₀.
        ArtifactError: The adapter's directory is broken.

    Warns:
        UserWarning: ``new`` is the covariance of which the adapter's null spaces were made.
    """
    for name, value in (("reference_rate", reference_rate), ("reference_rank", reference_rank)):
        if not math.isfinite(value) or value <= 0:
            raise KoreError(f"{name}: expected a positive number, got {value}")
    alpha = 2 * reference_rank if reference_alpha is None else reference_alpha
    if not math.isfinite(alpha) or alpha <= 0:
        raise KoreError(f"reference_alpha: expected a positive number, got {alpha}")
    updates, info = _updates(adapter), _info(adapter)
    if (info.get("config") or {}).get("train_a"):
        raise KoreError("the adapter's A is trained from B₀ ≠ 0, so its first steps are others; expected a frozen A")
    shared = [name for name in updates if name in new]
    if not shared:
        raise KoreError("the adapter has none of the covariance's layers; expected one of the same model")
    if _is_source(info.get("null_spaces") or {}, new, updates, shared):
        warnings.warn(
            "this is the covariance of the old data that A was made to be quiet on, so the rate comes out too high; "
            "capture one of new data (capture.new_samples)",
            stacklevel=2,
        )
    order = {group.name: index for index, group in enumerate(new.groups)}
    rates: dict[str, float] = {}
    read, C, lora = "", torch.empty(0), 0.0
    for name in sorted(shared, key=lambda name: order[new.group(name).name]):
        group = new.group(name)
        if group.tokens < 1:
            raise KoreError(f"{group.name}: the covariance counts no tokens; capture it again")
        if group.name != read:
            read, C = group.name, new[name].to(torch.float64)
            A0 = _peft_draw(reference_rank, C.shape[0], seed).to(C.device)
            lora = alpha / reference_rank * mean_l1(A0, C, group.tokens)
        A = updates[name].A
        if A.shape[-1] != C.shape[0]:
            raise KoreError(f"{name}: A has d_in = {A.shape[-1]}, the covariance {C.shape[0]}; capture it again")
        own = abs(updates[name].scaling) * mean_l1(A, C, group.tokens)
        if own > 0 and lora > 0:
            rates[name] = reference_rate * lora / own
    if not rates:
        raise KoreError("A x is 0 on this data in every layer: B cannot learn from it at any rate; lower the rank")
    rates = {name: rates[name] for name in shared if name in rates}
    return MatchedRate(statistics.median(rates.values()), rates, reference_rate)


def mean_l1(A: torch.Tensor, C: torch.Tensor, tokens: int) -> float:
    """E‖A x‖₁ = √(2/π) Σ_i √(a_i C a_iᵀ / tokens), for centred normal A x, with the second moments C = Σ xᵀx.

    Args:
        A: (r, d_in).
        C: (d_in, d_in). The arithmetic is float64 on its device.
        tokens: Rows x that C sums over.
    """
    C = C.double()
    A = A.detach().to(C.device, torch.float64)
    return math.sqrt(2 / math.pi / tokens) * float((A @ C * A).sum(1).clamp_min_(0).sqrt().sum())


def _peft_draw(rank: int, d_in: int, seed: int) -> torch.Tensor:
    A0 = torch.empty(rank, d_in, dtype=torch.float64)
    return A0.uniform_(-(d_in**-0.5), d_in**-0.5, generator=torch.Generator().manual_seed(seed))


def _updates(adapter: nn.Module | str | os.PathLike[str] | Mapping[str, Update]) -> dict[str, Update]:
    if isinstance(adapter, Mapping):
        return dict(adapter)
    if not isinstance(adapter, nn.Module):
        return read_updates(adapter)
    from peft.tuners.lora import LoraLayer

    from kore.models import base_model

    found: dict[str, Update] = {}
    module: Any
    A: Any
    B: Any
    for name, module in base_model(adapter).named_modules():
        if isinstance(module, LoraLayer):
            active = next((one for one in module.active_adapters if one in module.lora_A), None)
            if active is not None:
                A, B = module.lora_A[active].weight, module.lora_B[active].weight
                found[name] = Update(A, B, float(module.scaling[active]))
    if not found:
        raise KoreError(f"expected a model with a LoRA adapter, got {type(adapter).__name__} without one")
    return found


def _info(adapter: Any) -> Mapping[str, Any]:
    """What the adapter says of itself; nothing where KORE did not make it."""
    from kore.adapter.files import KORE_FILE, read_info

    if isinstance(adapter, (str, os.PathLike)):
        return read_info(adapter) if (Path(adapter) / KORE_FILE).is_file() else {}
    return getattr(adapter, "kore_info", None) or {}


def _is_source(notes: Mapping[str, Any], cov: CovarianceSet, updates: Mapping[str, Update], names: list[str]) -> bool:
    """Whether a covariance has, in the first layer that says so, the tokens and the energy in A's rows noted there."""
    from kore.analysis.leaks import row_space

    for name in names:
        note = notes.get(name) or {}
        if "energy" in note and "tokens" in note:
            if note["tokens"] != cov.tokens(name):
                return False
            C = cov[name].to(torch.float64)
            U = row_space(name, updates[name].A, C)
            energy = float((U * (C @ U)).sum())
            return math.isclose(energy, note["energy"], rel_tol=_SAME)
    return False
