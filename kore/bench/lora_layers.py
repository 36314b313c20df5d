"""The layers that the contenders of ``kore bench lora`` all compute: their tensors, exact results and flop floor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Linear layers d_in → d_out that read one input of so many tokens, each with an update of one rank."""

    d_in: int
    d_out: tuple[int, ...]
    tokens: int
    rank: int
    dtype: torch.dtype

    @property
    def shape(self) -> str:
        """``4096→11008 ×2``."""
        first, count = self.d_out[0], len(self.d_out)
        if self.d_out != (first,) * count:
            return f"{self.d_in}→{'+'.join(map(str, self.d_out))}"
        return f"{self.d_in}→{first}" + (f" ×{count}" if count > 1 else "")

    def floor(self, shared: bool = False) -> float:
        """Flops of the layers with a frozen A over those of the frozen layers, forward and input gradient.

        1 + r (2K + 3N) / (2KN) for one layer. Layers that share a basis need x U and its way back only once, and two
        (r, r) products each.
        """
        K, r, N, count = self.d_in, self.rank, sum(self.d_out), len(self.d_out)
        extra = 2 * K * r + 3 * N * r + 2 * count * r * r if shared else 2 * count * K * r + 3 * N * r
        return 1 + extra / (2 * K * N)


@dataclass(frozen=True)
class Layers:
    """The tensors of a case; ``A_i = R_i Uᵀ`` up to rounding, and without the others where there is one layer.

    Attributes:
        x: (tokens, d_in).
        gs: The gradient of every output.
        weights, As, Bs: Of every layer.
        U, Rs: The shared basis.
    """

    x: Tensor
    gs: list[Tensor]
    weights: list[Tensor]
    As: list[Tensor]
    Bs: list[Tensor]
    U: Tensor
    Rs: list[Tensor]

    @classmethod
    def random(cls, case: Case, device: torch.device) -> Layers:
        """Normal numbers, scaled so that base and update have outputs of one size."""
        torch.manual_seed(0)
        K, r, dtype = case.d_in, case.rank, case.dtype

        def normal(*shape: int, over: int = 1) -> Tensor:
            return (torch.randn(*shape, device=device) / over**0.5).to(dtype)

        U = torch.linalg.qr(torch.randn(K, r, device=device))[0].to(dtype)
        Rs = [normal(r, r, over=r) for _ in case.d_out]
        return cls(
            x=normal(case.tokens, K),
            gs=[normal(case.tokens, N) for N in case.d_out],
            weights=[normal(N, K, over=K) for N in case.d_out],
            As=[(R.double() @ U.double().T).to(dtype) for R in Rs],
            Bs=[normal(N, r, over=r) for N in case.d_out],
            U=U,
            Rs=Rs,
        )

    def exact(self) -> tuple[list[Tensor], list[Tensor]]:
        """Every y_i, then dx, then every dB_i, in float64, with A_i = R_i Uᵀ before it is rounded.

        First those of the frozen layers alone, which have no dB_i, then those with the update.
        """
        x, U = self.x.double(), self.U.double()
        h = x @ U
        frozen, adapted, dBs = [], [], []
        dx, update_dx = torch.zeros_like(x), torch.zeros_like(x)
        for tensors in zip(self.weights, self.Rs, self.Bs, self.gs):
            W, R, B, g = (tensor.double() for tensor in tensors)
            frozen.append(x @ W.T)
            adapted.append(frozen[-1] + h @ R.T @ B.T)
            dx += g @ W
            update_dx += g @ B @ R @ U.T
            dBs.append(g.T @ (h @ R.T))
        return [*frozen, dx], [*adapted, dx + update_dx, *dBs]
