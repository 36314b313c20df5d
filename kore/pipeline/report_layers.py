"""The section of the report that says what the trained adapter changes in each layer, and what it cannot exceed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kore.analysis.adapters import Update, read_updates
from kore.analysis.reconstruction import output_energy
from kore.analysis.retention import measure_update
from kore.covariance import CovarianceSet

if TYPE_CHECKING:
    from torch import nn

_WORST = 10
# Multiply-adds per second that may be counted on, and the seconds that ‖W0 x‖ may take.
_RATES, _SECONDS = {"cpu": 2e10, "cuda": 5e12}, 60.0


@dataclass(frozen=True)
class Change:
    """Of one layer on one data set: ‖ΔW x‖ and its bound, both over ‖W0 x‖ where that is known."""

    change: float
    bound: float


def measure(adapter: Path, cov: CovarianceSet, model: nn.Module | None) -> dict[str, Change]:
    """What the adapter changes on the data of ``cov``, by layer, in the order of the adapter.

    Args:
        adapter: Directory of a LoRA adapter.
        cov: Covariances of its model.
        model: The model, with or without the adapter; None leaves the values without their ‖W0 x‖.
    """
    from kore.models import named_linears

    updates = read_updates(adapter)
    linears = {} if model is None else named_linears(model)
    found: dict[str, Change] = {}
    for group in cov.groups:
        members = [name for name in group.modules if name in updates]
        if not members:
            continue
        C = cov[group.name]
        for name in members:
            kept = measure_update(updates[name], C)
            norm = 1.0 if model is None else _output_norm(name, linears[name], C)
            found[name] = Change(*(value / norm if norm else 0.0 for value in (kept.change, kept.bound)))
    return {name: found[name] for name in updates if name in found}


def is_quick(updates: Mapping[str, Update], device: torch.device) -> bool:
    """Whether ‖W0 x‖ of all layers, d_out d_in² operations each, is a matter of a minute on the device."""
    operations = sum(update.B.shape[0] * update.A.shape[1] ** 2 for update in updates.values())
    return operations <= _SECONDS * _RATES.get(device.type, _RATES["cpu"])


def _output_norm(name: str, linear: Any, C: torch.Tensor) -> float:
    """‖W0 x‖_F = √tr(W0 C W0ᵀ), its products in float32."""
    from kore.adapter.factors import read_weight

    W = read_weight(name, linear).float()
    return output_energy(W, C.to(W)) ** 0.5


def add_section(report: Any, out: Path, model: nn.Module | None) -> None:
    """The figure of all layers, and a table of those that change old outputs most."""
    from kore.artifacts import read_json
    from kore.covariance import load_covariance
    from kore.report import figures

    adapter = out / "train" / "adapter"
    updates = read_updates(adapter)
    if model is not None and not is_quick(updates, next(model.parameters()).device):
        model = None
    sets = {"old inputs": load_covariance(out / "covariance")}
    if (out / "covariance-new").is_dir():
        sets["new inputs"] = load_covariance(out / "covariance-new")
    changes = {name: measure(adapter, cov, model) for name, cov in sets.items()}
    over = "" if model is None else " / ‖W0 x‖"
    report.section(
        "What training changed in each layer",
        f"‖ΔW x‖{over}, over all tokens that were captured, and the bound ‖ΔB‖₂ √tr(A C Aᵀ){over}, whose second factor "
        "was fixed with A. A layer far above the others leaked.",
    )
    curves = {name: {module: each.change for module, each in layers.items()} for name, layers in changes.items()}
    report.figure(figures.leak_per_layer(curves, f"‖ΔW x‖{over}"), "The change of every layer's outputs.")
    info = out / "adapter-init" / "kore.json"
    spaces = read_json(info).get("null_spaces", {}) if info.is_file() else {}
    old, new = changes["old inputs"], changes.get("new inputs", {})
    worst = sorted(old, key=lambda module: -old[module].change)[:_WORST]
    columns = ["layer", "rank", "change, old", "its bound", *(["change, new"] if new else []), "E of the null space"]
    rows = []
    for module in worst:
        ratio = spaces.get(module, {}).get("energy_ratio")
        cells = [old[module].change, old[module].bound, *([new[module].change] if new and module in new else [])]
        if new and module not in new:
            cells.append(float("nan"))
        rows.append(
            [
                module,
                updates[module].A.shape[0],
                *(f"{value:.3g}" for value in cells),
                "–" if ratio is None else f"{ratio:.4f}",
            ]
        )
    report.table(
        columns,
        rows,
        f"The {len(rows)} layers that change old outputs most. E: energy of the null space over the least possible, "
        "as it was when the adapter was made.",
    )
