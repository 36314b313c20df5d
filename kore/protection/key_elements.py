"""The penalty of RegLoRA: where the task before changed the weights most, the new adapter changes them little."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from kore.errors import ConfigError
from kore.penalty import Penalty, Start
from kore.protection.adapted import AdaptedLayer, adapted_layers, at_least_float32

if TYPE_CHECKING:
    from kore.baselines.previous import Previous


def key_elements(B: torch.Tensor, A: torch.Tensor, share: float) -> torch.Tensor:
    """K: where |B A| is largest, as int32 positions in the flattened (d_out, d_in), in order.

    They are ⌊share · d_out · d_in⌋. Raises ConfigError where that is none.
    """
    dtype = at_least_float32(A)
    change = (B.to(dtype) @ A.to(dtype)).abs_().flatten()
    count = int(share * len(change))
    if count == 0:
        raise ConfigError(f"options.elements: {share:g} of {len(change)} elements is none; raise it")
    return change.topk(count).indices.sort().values.to(torch.int32)


class _Mean(torch.autograd.Function):
    """mean_{K} |B A|. B A is formed whole and not kept: gathered rows and columns of K would take r times K."""

    @staticmethod
    def forward(ctx: Any, B: torch.Tensor, A: torch.Tensor, K: torch.Tensor) -> torch.Tensor:
        dtype = at_least_float32(A)
        with torch.autocast(B.device.type, enabled=False):
            b, a, places = B.to(dtype), A.to(dtype), K.long()
            change = (b @ a).flatten()
            chosen = change[places]
            value = chosen.abs().mean()
            signs = change.zero_().index_copy_(0, places, chosen.sign() / len(places)).view(len(b), a.shape[1])
            ctx.save_for_backward(signs @ a.T, b.T @ signs)
        ctx.dtypes = B.dtype, A.dtype
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        of_B, of_A = ctx.saved_tensors
        return (of_B * grad).to(ctx.dtypes[0]), (of_A * grad).to(ctx.dtypes[1]), None


def mean_of_elements(B: torch.Tensor, A: torch.Tensor, K: torch.Tensor) -> torch.Tensor:
    """mean over K of |B A|, a scalar, with the gradients S Aᵀ of B and Bᵀ S of A, S = sign(B A) / |K| on K, else 0.

    Args:
        B: (d_out, r).
        A: (r, d_in).
        K: What :func:`key_elements` gives.
    """
    value: torch.Tensor = _Mean.apply(B, A, K)  # type: ignore[no-untyped-call]
    return value


class KeyElements(Penalty):
    """λ · the mean over the layers of mean_{(i,j) ∈ K} |B A|_ij, K being the key elements of the task before.

    Attributes:
        strength: λ.
        share: |K| over all elements of a layer.
        value: The mean when it was last computed, a detached scalar.
    """

    def __init__(self, previous: Previous, strength: float, share: float) -> None:
        self.strength, self.share = strength, share
        self.value: torch.Tensor | None = None
        self._previous = previous
        self._pairs: list[tuple[AdaptedLayer, torch.Tensor]] = []

    def identity(self) -> dict[str, Any]:
        return {"key_elements": {"strength": self.strength, "share": self.share}, **self._previous.identity()}

    def begin(self, start: Start) -> None:
        """Find K of every layer."""
        layers = adapted_layers(start.model)
        for name, before in self._previous.factors(start).items():
            assert before.B is not None
            self._pairs.append((layers[name], key_elements(before.B, before.A, self.share)))

    def step(self) -> torch.Tensor | None:
        if not self._pairs:
            return None
        values = [mean_of_elements(layer.B, layer.A, K) for layer, K in self._pairs]
        value = torch.stack([value.to(values[0].device) for value in values]).mean()
        self.value = value.detach()
        return value * self.strength

    def log(self) -> dict[str, float]:
        """The mean size of the key elements of B A, without λ."""
        return {} if self.value is None else {"key_elements": float(self.value)}
