"""CIA's moving average of the trained weights, whose rate is chosen anew for each tensor and step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from kore.errors import KoreError
from kore.penalty import Penalty, Start

RULES = ("paper", "official", "constant")


def paper_beta(
    g: torch.Tensor, g_before: torch.Tensor, now: torch.Tensor, before: torch.Tensor, shadow: torch.Tensor
) -> float:
    """β = (‖g‖ + 1) / (‖θ − θ*‖ h), h = ‖g − g'‖ / ‖θ − θ'‖ the second derivative, all norms L1; nan where undefined.

    In one dimension it is where d/dβ [L(θ* + …) − L(θ) + (θ*_t − θ*_{t−1})] is 0, L to second order at θ.

    Args:
        g: Gradient at ``now``.
        g_before: Gradient at ``before``.
        now: θ_t.
        before: θ_{t−1}.
        shadow: θ*_{t−1}.
    """
    moved, apart, bent = (_norm(x, y) for x, y in ((now, before), (now, shadow), (g, g_before)))
    return (_norm(g) + 1) * moved / (apart * bent) if apart * bent else math.nan


def official_beta(g: torch.Tensor, g_before: torch.Tensor, now: torch.Tensor, shadow: torch.Tensor) -> float:
    """1 − 2 (1 + ‖g‖) / (‖θ − θ*‖ ‖g − g'‖), as the authors' code has it; nan where undefined.

    There g is the gradient before the update that led to θ, and g' the one before that.
    """
    apart, bent = _norm(now, shadow), _norm(g, g_before)
    return 1 - 2 * (1 + _norm(g)) / (apart * bent) if apart * bent else math.nan


def _norm(x: torch.Tensor, y: torch.Tensor | None = None) -> float:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return float((x.to(dtype) if y is None else x.to(dtype) - y.to(dtype)).abs().sum(dtype=torch.float64))


class Averaging(Penalty):
    """θ*_t = β_t θ*_{t−1} + (1 − β_t) θ_t of every trained tensor, from θ*_0 = θ_0; the result is θ*. No loss is added.

    "paper": β_t of θ_t is computed when its gradient is there, before the update that follows it; the last θ has none
    and takes ``beta``. "official": after each update. "constant": after each update, with ``beta``. Where β is not
    between 0 and 1, it is ``beta``.

    Attributes:
        rule: One of :data:`RULES`.
        beta: The fallback.
        shadow: θ* by the name of the parameter; empty until training begins.
        adaptive: The share of tensors whose β was not the fallback, in the last step.
        mean: Of β over the tensors, in the last step.
    """

    reads_gradients = True

    def __init__(self, rule: str = "paper", beta: float = 0.99) -> None:
        self.rule, self.beta = rule, beta
        self.shadow: dict[str, torch.Tensor] = {}
        self.adaptive, self.mean = 0.0, beta
        self._trained: dict[str, nn.Parameter] = {}
        self._before: dict[str, torch.Tensor] = {}
        self._gradients: dict[str, torch.Tensor] = {}

    def identity(self) -> dict[str, Any]:
        return {"averaging": {"rule": self.rule, "beta": self.beta}}

    @torch.no_grad()
    def begin(self, start: Start) -> None:
        self._trained = {name: p for name, p in start.model.named_parameters() if p.requires_grad}
        self.shadow = {name: p.to(torch.promote_types(p.dtype, torch.float32), copy=True) for name, p in self._items()}
        self._before, self._gradients = {}, {}

    def _items(self) -> list[tuple[str, nn.Parameter]]:
        if not self._trained:
            raise KoreError("averaging: there is no shadow yet; kore.train calls begin first")
        return list(self._trained.items())

    @torch.no_grad()
    def before_update(self) -> None:
        if self.rule != "paper":
            return
        betas: dict[str, float] = {}
        for name, now in self._items():
            g = _gradient(now)
            if name in self._before:
                before = self._before[name]
                betas[name] = paper_beta(g, self._gradients[name], now, before, self._of(now, name))
            self._gradients[name], self._before[name] = g.clone(), now.detach().clone()
        if betas:  # θ_0 is the shadow itself
            self._average(betas)

    @torch.no_grad()
    def after_update(self) -> None:
        if self.rule == "paper":
            return
        betas: dict[str, float] = {}
        if self.rule == "official":
            for name, now in self._items():
                g = _gradient(now)
                if name in self._gradients:
                    betas[name] = official_beta(g, self._gradients[name], now, self._of(now, name))
                self._gradients[name] = g.clone()
        self._average(betas)

    def _average(self, betas: dict[str, float]) -> None:
        chosen, total = 0, 0.0
        for name, now in self._items():
            beta = betas.get(name, math.nan)
            inside = 0 < beta < 1
            beta = beta if inside else self.beta
            chosen, total = chosen + inside, total + beta
            shadow = self._of(now, name)
            self.shadow[name] = shadow.lerp_(now.detach().to(shadow.dtype), 1 - beta)
        self.adaptive, self.mean = chosen / len(self._trained), total / len(self._trained)

    def _of(self, parameter: nn.Parameter, name: str) -> torch.Tensor:
        """The shadow, where the parameter is."""
        self.shadow[name] = self.shadow[name].to(parameter.device)
        return self.shadow[name]

    @torch.no_grad()
    def finish(self) -> None:
        """Average the last θ too, where that has not been done, and put θ* in its place."""
        if self.rule == "paper":
            self._average({})
        for name, parameter in self._items():
            parameter.copy_(self.shadow[name])

    def state(self) -> dict[str, torch.Tensor]:
        parts = {"shadow": self.shadow, "before": self._before, "gradient": self._gradients}
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Raises KoreError where the checkpoint has another shadow."""
        parts: dict[str, dict[str, torch.Tensor]] = {"shadow": {}, "before": {}, "gradient": {}}
        for key, tensor in state.items():
            part, _, name = key.partition(".")
            if name not in self._trained or part not in parts:
                raise KoreError(f"averaging: {key} of the checkpoint is no trained tensor; start over, resume=False")
            parts[part][name] = tensor.to(self._trained[name].device)
        self.shadow, self._before, self._gradients = parts["shadow"], parts["before"], parts["gradient"]

    def log(self) -> dict[str, float]:
        """The share of tensors whose β was chosen and not the fallback, and the mean β."""
        return {"adaptive_beta": self.adaptive, "mean_beta": self.mean}


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()
