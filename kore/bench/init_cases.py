"""The other cases of ``kore bench init``: the null space of one covariance, and a small model with its capture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import kore
from kore.bench.capture import Batches, plain_pass
from kore.bench.check import InaccurateError
from kore.bench.init import EIGH, OFFICIAL, OURS, RATIO_GOAL, graded_covariance, official_basis, official_factor
from kore.bench.llava import LlavaShape, random_batches, random_llava
from kore.bench.machine import describe
from kore.bench.official import official_hooks
from kore.bench.timing import Clock, in_turn, ratio
from kore.environment import environment
from kore.models import language_model_linears, named_linears
from kore.nullspace import energy_ratio, null_space

EIGH_FLOAT32 = "eigh in float32"
Done = Callable[[str], None]


@dataclass(frozen=True)
class CovariancePlan:
    """One covariance alone: its width d, r, the rounds of every contender, and the condition before outliers."""

    width: int
    rank: int
    rounds: int
    condition: float = 1e9


@dataclass(frozen=True)
class ModelPlan:
    """A random LLaVA, captured on ``samples`` of one image and ``text_tokens`` each and initialised at rank r."""

    shape: LlavaShape
    samples: int
    rank: int
    rounds: int
    text_tokens: int = 64


def run_covariance(plan: CovariancePlan, device: torch.device, done: Done = lambda name: None) -> dict[str, Any]:
    """The null space of a graded float32 covariance by our solvers, by eigh in float32 and by the recipe's svd.

    Raises:
        InaccurateError: Ours has an energy ratio above 1.02 and above that of the recipe.
    """
    C = graded_covariance(plan.width, plan.condition, 0, device)
    bases: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: null_space(C, plan.rank).basis,
        EIGH: lambda: null_space(C, plan.rank, "eigh").basis,
        EIGH_FLOAT32: lambda: torch.linalg.eigh(C).eigenvectors[:, : plan.rank],
        OFFICIAL: lambda: official_basis(C, plan.rank),
    }
    found = null_space(C, plan.rank)
    quality = {"d": plan.width, "method": found.method, "iterations": found.iterations}
    quality["energy_ratio"] = _ratios(C, {name: basis() for name, basis in bases.items()})
    result = _timed(bases, device, plan.rounds, done)
    return {**asdict(plan), "case": "covariance", **result, "null_spaces": {"C": quality}}


def run_model(plan: ModelPlan, device: torch.device, done: Done = lambda name: None) -> dict[str, Any]:
    """Capture and initialisation of a whole model: ``capture_covariance`` and ``get_kore_model``, and the recipe's.

    Raises:
        InaccurateError: Ours has an energy ratio above 1.02 and above that of the recipe, in the first layer.
    """
    model = random_llava(plan.shape, device, torch.float32)
    batches = random_batches(plan.shape, plan.samples, 1, plan.text_tokens, torch.float32)
    made: list[Any] = []

    def ours() -> None:
        cov = kore.capture_covariance(model, batches, progress=False, distributed=False)
        config = kore.KoreConfig(rank=plan.rank)
        made.append(kore.get_kore_model(model, cov, config, progress=False, distributed=False))

    def unload() -> None:
        while made:
            made.pop().unload()

    steps = {OURS: ours, OFFICIAL: lambda: _official(model, batches, plan.rank)}
    quality = _quality(model, batches, plan.rank)
    result = _timed(steps, device, plan.rounds, done, unload)
    return {
        "case": "model",
        **{name: getattr(plan.shape, name) for name in ("layers", "width", "inner")},
        "samples": plan.samples,
        "tokens": plan.samples * (plan.text_tokens + plan.shape.image_tokens),
        "rank": plan.rank,
        **result,
        "null_spaces": quality,
    }


def _official(model: nn.Module, batches: Batches, rank: int) -> list[Tensor]:
    """The recipe: hooks on every linear in one pass over the samples, then two full SVDs for every linear."""
    linears = named_linears(model)
    with torch.no_grad(), official_hooks(model) as sums:
        plain_pass(model, batches)
        return [official_factor(linears[name].weight, official_basis(total, rank)) for name, total in sums.items()]


def _quality(model: nn.Module, batches: Batches, rank: int) -> dict[str, dict[str, Any]]:
    """Energy ratios of the first layer's inputs on the sums that each way captures."""
    cov = kore.capture_covariance(model, batches, progress=False, distributed=False)
    with official_hooks(model) as sums:
        plain_pass(model, batches)
    first = [name for name in language_model_linears(model) if ".layers.0." in f".{name}"]
    found: dict[str, dict[str, Any]] = {}
    for name in first:
        if cov.group(name).name != name:
            continue
        C = cov[name]
        ours = null_space(C, rank)
        ratios = _ratios(C, {OURS: ours.basis, OFFICIAL: official_basis(sums[name], rank)})
        short = name.rpartition(".")[2]
        found[short] = {"d": len(C), "method": ours.method, "iterations": ours.iterations, "energy_ratio": ratios}
    return found


def _ratios(C: Tensor, bases: Mapping[str, Tensor]) -> dict[str, float]:
    ratios = {name: energy_ratio(C, torch.linalg.qr(basis.double()).Q) for name, basis in bases.items()}
    if not ratios[OURS] <= max(RATIO_GOAL, ratios[OFFICIAL]):
        raise InaccurateError(f"energy ratio {ratios[OURS]:.4f} at d = {len(C)}, allowed are {RATIO_GOAL}")
    return ratios


def _timed(
    steps: Mapping[str, Callable[[], Any]],
    device: torch.device,
    rounds: int,
    done: Done,
    after: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Seconds of all contenders in turn; ``after`` each call, outside of its time, something is put back."""
    clock = Clock(device)

    def seconds(step: Callable[[], Any]) -> float:
        took = clock.wall_seconds(step)
        after()
        done("")
        return took

    times = in_turn(steps, seconds, rounds, warm_up=0)
    return {
        "rounds": rounds,
        "backend": "torch.linalg",
        "median_s": {name: statistics.median(values) for name, values in times.items()},
        "ours_is_faster": {name: ratio(times[name], times[OURS]) for name in steps},
        "environment": environment(),
        "machine": describe(device),
    }
