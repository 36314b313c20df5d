"""Two-sided protection: what leaks through A is paid for by what it does at the layer's output."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from kore.covariance import CovarianceSet, OutputGradients
from kore.errors import KoreError
from kore.models import base_model, check_fingerprint


@dataclass
class Term:
    """The share of one layer.

    Attributes:
        module: Its name.
        B: (d_out, r), trained.
        G: (d_out, d_out), of the old data, per row.
        M: (r, r), s² A C Aᵀ per row.
    """

    module: str
    B: nn.Parameter
    G: torch.Tensor
    M: torch.Tensor

    def value(self) -> torch.Tensor:
        if self.G.device != self.B.device:
            self.G, self.M = self.G.to(self.B.device), self.M.to(self.B.device)
        result: torch.Tensor = _Trace.apply(self.B, self.G, self.M)  # type: ignore[no-untyped-call]
        return result


class _Trace(torch.autograd.Function):
    """tr(Bᵀ G B M) for symmetric G and M. One product with G serves the value and the gradient 2 G B M."""

    @staticmethod
    def forward(ctx: Any, B: torch.Tensor, G: torch.Tensor, M: torch.Tensor) -> torch.Tensor:
        with torch.autocast(B.device.type, enabled=False):
            GBM = G @ B.to(G.dtype) @ M
        ctx.save_for_backward(GBM)
        ctx.dtype = B.dtype
        return (B * GBM).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (GBM,) = ctx.saved_tensors
        return (GBM * (2 * grad)).to(ctx.dtype), None, None


class TwoSided:
    """λ Σ tr(Bᵀ G B · s² A C Aᵀ) over the adapted layers, with G and C divided by their tokens. Call it for its value.

    Attributes:
        strength: λ.
        terms: The layers.
    """

    def __init__(self, terms: Sequence[Term], strength: float) -> None:
        self.terms, self.strength = list(terms), strength

    def __call__(self) -> torch.Tensor:
        """The penalty, a scalar that carries the gradient 2 λ G B M of every B."""
        first = self.terms[0].B.device
        return self.strength * torch.stack([term.value().to(first) for term in self.terms]).sum()

    def bytes(self) -> int:
        """Memory of all G and M."""
        return sum(matrix.nbytes for term in self.terms for matrix in (term.G, term.M))

    def identity(self) -> dict[str, Any]:
        """What a training run that uses it depends on."""
        digest = hashlib.sha256()
        for term in self.terms:
            digest.update(term.module.encode())
            for values in (term.G.diagonal(), term.M):
                digest.update(values.contiguous().cpu().numpy().tobytes())
        return {"two_sided": self.strength, "matrices": digest.hexdigest()}


def two_sided(model: nn.Module, cov: CovarianceSet, gradients: OutputGradients, strength: float) -> TwoSided:
    """The penalty λ tr(Bᵀ G B · s² A C Aᵀ) of an adapter with frozen A, to be given to :func:`kore.train`.

    ΔW = s B A, so without λ this is tr(ΔWᵀ G ΔW C): twice the Kronecker-factored estimate of the divergence
    KL(old ‖ new) on the old data, in nats for each counted row, when ``cov`` and ``gradients`` come from the same
    rows. That is λ's unit: at λ = 2, one nat for each old row costs what one nat for each new answer token costs.
    M = s² A C Aᵀ is computed here, once, in float64. A step then costs one product G B for each layer, 2 d_out² r
    operations, whatever the batch size.

    Args:
        model: A PEFT model whose adapter's A is frozen.
        cov: Input covariances of old data, from :func:`kore.capture_covariance`; balanced ones will do.
        gradients: Output gradients of old data, from :func:`kore.capture_output_gradients`.
        strength: λ ≥ 0.

    Returns:
        The penalty. It holds every G beside its B: d_out² numbers for each layer, in float32, or float64 for a B in
        float64.

    Raises:
        KoreError: λ is wrong, an adapted layer has a trained A or no matrix in one of the sets, or is not finite
            there, or there is no adapter.
        ModelError: One of the sets belongs to another model.
    """
    from peft.tuners.lora import LoraLayer

    if not math.isfinite(strength) or strength < 0:
        raise KoreError(f"strength: expected a finite number ≥ 0, got {strength}")
    if not isinstance(gradients, OutputGradients) or isinstance(cov, OutputGradients):
        raise KoreError(
            "two_sided: expected a covariance and output gradients, in this order, got "
            f"{type(cov).__name__} and {type(gradients).__name__}"
        )
    check_fingerprint(cov.fingerprint, model, "the covariance")
    check_fingerprint(gradients.fingerprint, model, "the output gradients")
    terms: list[Term] = []
    A: Any
    B: Any
    for name, module in base_model(model).named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter in module.active_adapters:
            if adapter in module.lora_A:
                A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
                if A.requires_grad:
                    raise KoreError(f"{name}: its A is trained; two-sided protection needs a frozen A (kore.freeze_a)")
                terms.append(_term(name, A, B, float(module.scaling[adapter]), cov, gradients))
    if not terms:
        raise KoreError("two_sided: the model has no LoRA adapter; wrap it with get_kore_model first")
    return TwoSided(terms, float(strength))


@torch.no_grad()
def _term(
    name: str, A: torch.Tensor, B: nn.Parameter, scaling: float, cov: CovarianceSet, gradients: OutputGradients
) -> Term:
    C, G = cov[name], gradients[name]
    dtype = torch.promote_types(B.dtype, torch.float32)
    G = G.to(device=B.device, dtype=torch.float64).div_(max(1, gradients.tokens(name))).to(dtype)
    A, C = A.detach().to(C.device, torch.float64), C.to(torch.float64)
    M = A @ C @ A.T * (scaling**2 / max(1, cov.tokens(name)))
    if not (torch.isfinite(G).all() and torch.isfinite(M).all()):
        raise KoreError(f"{name}: its covariance or its output gradients hold NaN or infinity; capture them again")
    return Term(name, B, G, ((M + M.T) / 2).to(B.device, dtype))
