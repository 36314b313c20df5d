"""The penalty of O-LoRA: a new adapter shall read other inputs than the one before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kore.penalty import Penalty, Start
from kore.protection.adapted import AdaptedLayer, adapted_layers, at_least_float32

if TYPE_CHECKING:
    from kore.baselines.previous import Previous

FORMS = ("overlap", "squared", "absolute")


def overlap(new: torch.Tensor, old: torch.Tensor, form: str = "overlap") -> torch.Tensor:
    """How far the rows of ``new`` (r, d) point where those of ``old`` (k, d) do; a scalar.

    "squared": ‖M‖²_F of M = A_new A_oldᵀ, with the gradient 2 M A_old. "absolute": Σ |M_ij|, with sign(M) A_old.
    "overlap": min(r, k) ‖M‖²_F / (‖A_new‖²_F ‖A_old‖²_F); of matrices with orthonormal rows, the mean cos² of the
    principal angles between what they span: 1 where one holds the other, and max(r, k) / d on average at random.
    """
    with torch.autocast(new.device.type, enabled=False):
        old = old.to(at_least_float32(new))
        new = new.to(old.dtype)
        products = new @ old.T
        if form == "absolute":
            return products.abs().sum()
        squares = products.square().sum()
        if form == "squared":
            return squares
        return min(len(new), len(old)) * squares / (new.square().sum() * old.square().sum())


class Orthogonality(Penalty):
    """λ · the overlap of A with that of the task before: its mean over the layers, or the sum of the other forms.

    Attributes:
        strength: λ.
        form: One of :data:`FORMS`, see :func:`overlap`.
        value: The overlap when it was last computed, a detached scalar.
    """

    def __init__(self, previous: Previous, strength: float = 1.0, form: str = "overlap") -> None:
        self.strength, self.form = strength, form
        self.value: torch.Tensor | None = None
        self._previous = previous
        self._pairs: list[tuple[AdaptedLayer, torch.Tensor]] = []

    def identity(self) -> dict[str, Any]:
        return {"orthogonality": {"strength": self.strength, "form": self.form}, **self._previous.identity()}

    def begin(self, start: Start) -> None:
        """Find A of the task before."""
        factors = self._previous.factors(start)
        layers = adapted_layers(start.model)
        self._pairs = [(layers[name], before.A) for name, before in factors.items()]

    def step(self) -> torch.Tensor | None:
        if not self._pairs:
            return None
        values = [overlap(layer.A, before.to(layer.A.device), self.form) for layer, before in self._pairs]
        total = torch.stack([value.to(values[0].device) for value in values]).sum()
        value = total / len(values) if self.form == "overlap" else total
        self.value = value.detach()
        return value * self.strength

    def log(self) -> dict[str, float]:
        """The overlap, without λ."""
        return {} if self.value is None else {"old_overlap": float(self.value)}
