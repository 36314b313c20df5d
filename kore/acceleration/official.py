"""The linear layer of the official KORE code, which comes from remote code and so is known by what it holds."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from kore.acceleration.fused import Fused, Kind
from kore.official.linear import forward, is_official, plain_forward, refusal


@functools.cache
def _fused(plain: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``plain`` that runs fused."""

    def fused_forward(self: nn.Module, input: Tensor) -> Tensor:
        return forward(self, input)

    return type(f"Fused{plain.__name__}", (Fused, plain), {"plain": plain, "forward": fused_forward})


def _refusal(module: nn.Module) -> str | None:
    return refusal(module) or (None if _same_formula(module) else "its forward is not that of the official module")


def _same_formula(module: nn.Module) -> bool:
    """Whether the class of ``module`` computes the official formula, seen on a small copy with other weights."""
    probe: Any = nn.Module.__new__(type(module))
    nn.Module.__init__(probe)
    probe.__dict__.update({name: value for name, value in vars(module).items() if name not in vars(probe)})
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.rand(*shape, dtype=torch.float64, generator=generator), requires_grad=False)

    probe.BLinear, probe.ALinear = nn.Linear(3, 2, bias=False), nn.Linear(2, 4)
    probe.BLinear.weight, probe.ALinear.weight, probe.ALinear.bias = weight(2, 3), weight(4, 2), weight(4)
    probe.weight_residual = weight(4, 3)
    probe.train(module.training)
    x = torch.rand(5, 3, dtype=torch.float64, generator=generator)
    try:
        with torch.random.fork_rng(devices=[]):
            return bool(torch.allclose(probe(x), plain_forward(probe, x), rtol=1e-9, atol=0))
    except Exception:
        return False


KIND = Kind(is_official, _fused, _refusal)
