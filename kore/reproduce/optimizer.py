"""Muon (Jordan et al. 2024), which brings the small models here to the same loss in about half of AdamW's steps.

torch has it from 2.9 on; this one also serves the older versions that KORE supports, with the same results in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """U V^T of the singular value decomposition, roughly: singular values come to about 0.7 ... 1.2.

    Five iterations X ← a X + (b XX^T + c (XX^T)²) X from X = matrix / ‖matrix‖_F, on the shorter side.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for matrices only.

    For a weight (rows, columns): M ← μM + G, W ← (1 - lr·decay) W - lr · sqrt(max(1, rows / columns)) ·
    orthogonalized(G + μM).

    Args:
        params: Matrices.
        lr: Learning rate; 0.02 is usual.
        momentum: μ.
        weight_decay: Decoupled.
    """

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """One step with the gradients that are there."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                moving = state.setdefault("momentum", torch.zeros_like(weight))
                moving.mul_(group["momentum"]).add_(weight.grad)
                update = orthogonalized(weight.grad + group["momentum"] * moving)
                stretch = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * stretch)


class Training:
    """Muon for the matrices of the layers, AdamW for the rest, both on a one-cycle schedule.

    Args:
        parameters: All that train.
        layers: The modules whose matrices Muon takes.
        rate: Peak learning rate of AdamW; Muon's is ten times that.
        steps: That will be taken.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], layers: nn.Module, rate: float, steps: int) -> None:
        self.parameters = list(parameters)
        inside = {id(p) for p in layers.parameters()}
        matrices = [p for p in self.parameters if p.ndim == 2 and id(p) in inside]
        taken = {id(p) for p in matrices}
        rest = [p for p in self.parameters if id(p) not in taken]
        optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, 10 * rate),
            torch.optim.AdamW(rest, rate, weight_decay=0.02, betas=(0.9, 0.98)),
        ]
        self._both = [
            (one, torch.optim.lr_scheduler.OneCycleLR(one, peak, steps, pct_start=0.05, cycle_momentum=False))
            for one, peak in zip(optimizers, (10 * rate, rate))
        ]

    def step(self, loss: torch.Tensor) -> None:
        """Backward, clip to norm 1, update, clear."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, schedule in self._both:
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
