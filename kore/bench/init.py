"""``kore bench init``: the adapter factors of a decoder layer, beside the published recipe.

The recipe decomposes for every linear layer, whether it shares its input or not, the covariance C and then W0 P in
full, both in W0's float32; A = √Σ Vᵀ of the r largest. Source: arXiv 2510.19316 and KORE-LMM/KORE. ``kore`` solves once
for every input and decomposes W0 U.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kore.adapter.factors import thin_init
from kore.bench.check import InaccurateError
from kore.bench.machine import describe
from kore.bench.timing import Clock, in_turn, ratio
from kore.environment import environment
from kore.nullspace import NullSpace, energy_ratio, null_space

OURS, EIGH, OFFICIAL = "kore", "kore, eigh", "official recipe"
RATIO_GOAL = 1.02


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        width: d of the layer's inputs but that of down_proj.
        inner: d_in of down_proj.
        rank: r.
        rounds: Of every contender.
        condition: Largest over smallest eigenvalue of the covariances, before outlier channels.
    """

    width: int
    inner: int
    rank: int
    rounds: int
    condition: float = 1e9

    def layers(self) -> dict[str, tuple[str, int]]:
        """For each linear of a Llama layer, what it reads and its d_out."""
        attention = dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("attention input", self.width))
        mlp = dict.fromkeys(("gate_proj", "up_proj"), ("mlp input", self.inner))
        return attention | {"o_proj": ("heads", self.width)} | mlp | {"down_proj": ("inner", self.width)}

    def inputs(self) -> dict[str, int]:
        """d_in of everything that is read."""
        return {
            name: self.inner if name == "inner" else self.width
            for name in dict.fromkeys(reads for reads, _ in self.layers().values())
        }


def graded_covariance(
    d: int,
    condition: float,
    seed: int,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(d, d) with eigenvalues in a geometric series, then six channels with 60 times the amplitude; made in float64."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator).to(device)).Q
    C = (Q * condition ** -torch.linspace(0, 1, d, dtype=torch.float64, device=device)) @ Q.mT
    scale = torch.ones(d, dtype=torch.float64)
    scale[torch.randperm(d, generator=generator)[:6]] = 60
    C.mul_(scale.to(C.device)).mul_(scale.to(C.device)[:, None])
    return C.add_(C.mT.clone()).div_(2).to(dtype)


def run(plan: Plan, device: torch.device, done: Callable[[str], None] = lambda name: None) -> dict[str, Any]:
    """Check the null spaces against float64, then time all contenders in turn.

    Raises:
        InaccurateError: A null space of ours has an energy ratio above 1.02 and above that of the recipe.
    """
    covariances = {
        name: graded_covariance(d, plan.condition, seed, device) for seed, (name, d) in enumerate(plan.inputs().items())
    }
    weights = {
        name: (torch.randn(d_out, plan.inputs()[reads]) / plan.inputs()[reads] ** 0.5).to(device)
        for name, (reads, d_out) in plan.layers().items()
    }
    quality, clock = _quality(plan, covariances), Clock(device)
    steps: dict[str, Callable[[], Any]] = {
        OURS: lambda: _ours(plan, covariances, weights, "auto"),
        EIGH: lambda: _ours(plan, covariances, weights, "eigh"),
        OFFICIAL: lambda: _official(plan, covariances, weights),
    }

    def seconds(step: Callable[[], Any]) -> float:
        took = clock.wall_seconds(step)
        done("")
        return took

    times = in_turn(steps, seconds, plan.rounds, warm_up=1)
    return {
        "case": "layer",
        **{key: value for key, value in asdict(plan).items() if key != "rounds"},
        "rounds": len(times[OURS]),
        "backend": "torch.linalg",
        "null_spaces": quality,
        "median_s": {name: statistics.median(values) for name, values in times.items()},
        "ours_is_faster": {name: ratio(times[name], times[OURS]) for name in steps},
        "environment": environment(),
        "machine": describe(device),
    }


def _quality(plan: Plan, covariances: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    found = {}
    for name, C in covariances.items():
        exact = C.double()
        ours = null_space(C, plan.rank)
        ratios = {
            OURS: energy_ratio(exact, ours.basis),
            OFFICIAL: energy_ratio(exact, torch.linalg.qr(official_basis(C, plan.rank).double()).Q),
        }
        if not ratios[OURS] <= max(RATIO_GOAL, ratios[OFFICIAL]):
            raise InaccurateError(f"{name}: energy ratio {ratios[OURS]:.4f}, allowed are {RATIO_GOAL}")
        found[name] = {"d": len(C), "method": ours.method, "iterations": ours.iterations, "energy_ratio": ratios}
    return found


def _ours(plan: Plan, covariances: Mapping[str, Tensor], weights: Mapping[str, Tensor], method: str) -> list[Tensor]:
    solved: dict[str, NullSpace] = {}
    factors = []
    for name, (reads, _) in plan.layers().items():
        if reads not in solved:
            solved[reads] = null_space(covariances[reads], plan.rank, method)
        factors.append(thin_init(weights[name], solved[reads].basis))
    return factors


def official_basis(C: Tensor, rank: int) -> Tensor:
    """U (d, r) of the recipe: the last left singular vectors of C, by a full SVD in its dtype."""
    return torch.linalg.svd(C).U[:, -rank:]


def official_factor(weight: Tensor, basis: Tensor) -> Tensor:
    """A (r, d_in) of the recipe: √Σ Vᵀ of the r largest of a full SVD of W0 P, in W0's dtype."""
    rank = basis.shape[1]
    _, singular, Vh = torch.linalg.svd(weight @ (basis @ basis.mT), full_matrices=False)
    return singular[:rank].sqrt()[:, None] * Vh[:rank]


def _official(plan: Plan, covariances: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[Tensor]:
    return [
        official_factor(weights[name], official_basis(covariances[reads], plan.rank))
        for name, (reads, _) in plan.layers().items()
    ]
