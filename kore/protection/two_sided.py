"""Two-sided protection: what leaks through A is paid for by what it does at the layer's output."""

from __future__ import annotations

import hashlib
import logging
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
from kore.penalty import Penalty, Start
from kore.processes import is_main_process
from kore.protection.factored import Factored, factored

_log = logging.getLogger(__name__)

AUTO = "auto"
STRENGTH = "strength.json"
DTYPES = ("float32", "bfloat16")


@dataclass
class Term:
    """The share of one layer.

    Attributes:
        module: Its name.
        layer: PEFT's layer there, and which of its adapters. B (d_out, r) is looked up in it, since FSDP2 replaces it.
        adapter: See ``layer``.
        G: (d_out, d_out), of the old data, per row; whole or factored.
        M: (r, r), s² A C Aᵀ per row.
        digest: Tells G and M from others.
    """

    module: str
    layer: Any
    adapter: str
    G: torch.Tensor | Factored
    M: torch.Tensor
    digest: str

    @property
    def B(self) -> nn.Parameter:
        weight: nn.Parameter = self.layer.lora_B[self.adapter].weight
        return weight

    def value(self) -> torch.Tensor:
        B: Any = self.B
        if hasattr(B, "full_tensor"):  # sharded by FSDP2; its gradient is cut into shards again
            B = B.full_tensor()
        if self.G.device != B.device:
            self.G, self.M = self.G.to(B.device), self.M.to(B.device)
        result: torch.Tensor = _Trace.apply(B, self.G, self.M)  # type: ignore[no-untyped-call]
        return result


class _Trace(torch.autograd.Function):
    """tr(Bᵀ G B M) for symmetric G and M. One product with G serves the value and the gradient 2 G B M."""

    @staticmethod
    def forward(ctx: Any, B: torch.Tensor, G: torch.Tensor | Factored, M: torch.Tensor) -> torch.Tensor:
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


class TwoSided(Penalty):
    """λ Q with Q = Σ tr(Bᵀ G B · s² A C Aᵀ) over the adapted layers, G and C divided by their tokens. Call it.

    Attributes:
        strength: λ; None for the rule ``"auto"`` until :meth:`settle`.
        terms: The layers.
        max_divergence: κ of the rule ``"auto"``.
        divergence: Q / 2 when it was last called, a detached scalar: the estimate of KL(old ‖ new) in nats for each
            old row.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        strength: float | None,
        max_divergence: float,
        components: int | None = None,
        dtype: str = "float32",
    ) -> None:
        self.terms, self.strength, self.max_divergence = list(terms), strength, max_divergence
        self.divergence: torch.Tensor | None = None
        kept = {"components": components, "dtype": dtype}
        by_rule = {"strength": AUTO, "max_divergence": max_divergence}
        self._settings = {**(by_rule if strength is None else {"strength": strength}), **kept}

    def __call__(self) -> torch.Tensor:
        """The penalty, a scalar that carries the gradient 2 λ G B M of every B.

        Raises:
            KoreError: λ is ``"auto"`` and not settled yet.
        """
        if self.strength is None:
            raise KoreError("two_sided: strength is 'auto', which kore.train sets; or call settle(loss) first")
        first = self.terms[0].B.device
        Q = torch.stack([term.value().to(first) for term in self.terms]).sum()
        self.divergence = Q.detach() / 2
        return self.strength * Q

    def step(self) -> torch.Tensor:
        """As a call."""
        return self()

    def log(self) -> dict[str, float]:
        """The estimate of KL(old ‖ new) in nats for each old row."""
        return {} if self.divergence is None else {"old_divergence": float(self.divergence)}

    def begin(self, start: Start) -> None:
        """With the strength ``"auto"``, set λ from the untouched model's loss, once for a run."""
        if self._settings["strength"] != AUTO:
            return

        def measure() -> dict[str, Any]:
            loss = start.untouched_loss()
            return {**self.settings(), "strength": self.settle(loss), "loss": loss}

        loss = float(start.kept(STRENGTH, measure)["loss"])
        strength = self.settle(loss)
        if is_main_process():
            _log.info("λ = %.4g, from a loss of %.4g on the new answers before training", strength, loss)

    def settle(self, loss: float) -> float:
        """Set λ = L0 / (2 κ) by the rule ``"auto"``, from L0, the untouched model's mean loss on new answer tokens.

        Where λ is a number it stays. Returns λ.
        """
        if self._settings["strength"] == AUTO:
            if not math.isfinite(loss) or loss <= 0:
                raise KoreError(f"two_sided: expected a finite loss > 0 to set the strength from, got {loss}")
            self.strength = loss / (2 * self.max_divergence)
        assert self.strength is not None
        return self.strength

    def bytes(self) -> int:
        """Memory of all G and M."""
        return sum(matrix.nbytes for term in self.terms for matrix in (term.G, term.M))

    def settings(self) -> dict[str, Any]:
        """The arguments it was made with, named as in the configuration section ``protection``."""
        return dict(self._settings)

    def identity(self) -> dict[str, Any]:
        """What a training run that uses it depends on."""
        digest = hashlib.sha256("".join(f"{term.module} {term.digest} " for term in self.terms).encode())
        return {"two_sided": self.settings(), "matrices": digest.hexdigest()}


def two_sided(
    model: nn.Module,
    cov: CovarianceSet,
    gradients: OutputGradients,
    strength: float | str = AUTO,
    *,
    max_divergence: float = 0.03,
    components: int | None = None,
    dtype: str = "float32",
) -> TwoSided:
    """The penalty λ Q, Q = Σ tr(Bᵀ G B · s² A C Aᵀ), of an adapter with frozen A, to be given to :func:`kore.train`.

    ΔW = s B A, so Q = Σ tr(ΔWᵀ G ΔW C): twice the Kronecker-factored estimate of the divergence KL(old ‖ new) on the
    old data, in nats for each counted row, when ``cov`` and ``gradients`` come from the same rows. That is λ's unit:
    at λ = ½, one nat for each old row costs what one nat for each new answer token costs.

    *The rule* ``strength="auto"``: λ = L0 / (2 κ), where L0 is the untouched model's mean loss per new answer token and
    κ = ``max_divergence``. At B = 0 the objective is L0, and the new loss cannot fall below 0; so wherever the
    objective is no higher than it was at the start, λ Q ≤ L0, and the estimated divergence Q / 2 is at most κ nats for
    each old row. :func:`kore.train` measures L0 before the first step.

    *Cost.* M = s² A C Aᵀ is computed here, once, in float64. A step then costs one product G B for each layer, whatever
    the batch size: 2 d_out² r operations, 4 d_out k r with ``components``. Over a step of T tokens on the frozen layer,
    which takes 4 d_in d_out T, the whole G adds r d_out / (2 d_in T): two Llama layers of d = 1024, f = 2752 with
    r = 235 took 1.30 × as long at T = 512 on one CPU core, 1.14 × with k = 128 (158 MiB became 13). G takes d_out²
    numbers for each layer in every process (42 GB in float32 for the 224 layers of LLaVA-1.5-7B), with ``components``
    d_out (k + 1) (0.7 GB at k = 256 in bfloat16).

    *Components.* G is replaced by F Fᵀ + D, its k largest components and the diagonal of the rest, which is positive
    semi-definite and keeps every diagonal entry of G; see :func:`kore.protection.factored.factored`. On the demo's
    model (d_out 192 and 512, KORE r = 64) Q of trained adapters comes out within 5 % at k = 32 and 2 % at k = 64, its
    gradient within 5 % and 2 % where training had no penalty, 32 % and 13 % where the whole G at λ = 128 had moved B
    into G's quiet directions. There the diagonal asks too much rather than too little: for a random A up to twice Q at
    k = 64.

    Args:
        model: A PEFT model whose adapter's A is frozen.
        cov: Input covariances of old data, from :func:`kore.capture_covariance`; balanced ones will do.
        gradients: Output gradients of old data, from :func:`kore.capture_output_gradients`.
        strength: λ ≥ 0, or ``"auto"``.
        max_divergence: κ > 0, for ``"auto"``.
        components: k; None keeps all of G.
        dtype: Of the components in memory. ``"bfloat16"`` only with ``components``: a whole G that is rounded to it has
            negative eigenvalues, and training would follow them without end.

    Returns:
        The penalty. It holds every G beside its B, in float32, or float64 for a B in float64.

    Raises:
        KoreError: An argument is wrong, an adapted layer has a trained A or no matrix in one of the sets, or is not
            finite there, or there is no adapter.
        ModelError: One of the sets belongs to another model.
    """
    from peft.tuners.lora import LoraLayer

    _check(strength, max_divergence, components, dtype)
    if not isinstance(gradients, OutputGradients) or isinstance(cov, OutputGradients):
        raise KoreError(
            "two_sided: expected a covariance and output gradients, in this order, got "
            f"{type(cov).__name__} and {type(gradients).__name__}"
        )
    check_fingerprint(cov.fingerprint, model, "the covariance")
    check_fingerprint(gradients.fingerprint, model, "the output gradients")
    terms: list[Term] = []
    for name, module in base_model(model).named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter in module.active_adapters:
            if adapter in module.lora_A:
                if module.lora_A[adapter].weight.requires_grad:
                    raise KoreError(f"{name}: its A is trained; two-sided protection needs a frozen A (kore.freeze_a)")
                terms.append(_term(name, module, adapter, cov, gradients, components, getattr(torch, dtype)))
    if not terms:
        raise KoreError("two_sided: the model has no LoRA adapter; wrap it with get_kore_model first")
    return TwoSided(terms, None if isinstance(strength, str) else float(strength), max_divergence, components, dtype)


def _check(strength: float | str, max_divergence: float, components: int | None, dtype: str) -> None:
    if strength != AUTO and (isinstance(strength, str) or not math.isfinite(strength) or strength < 0):
        raise KoreError(f"strength: expected a finite number ≥ 0 or {AUTO!r}, got {strength!r}")
    if not math.isfinite(max_divergence) or max_divergence <= 0:
        raise KoreError(f"max_divergence: expected a finite number > 0, got {max_divergence}")
    if components is not None and components < 1:
        raise KoreError(f"components: expected a number ≥ 1 or None, got {components}")
    if dtype not in DTYPES or (dtype != "float32" and components is None):
        raise KoreError(f"dtype: expected float32, or bfloat16 with components, got {dtype!r}")


@torch.no_grad()
def _term(
    name: str,
    layer: Any,
    adapter: str,
    cov: CovarianceSet,
    gradients: OutputGradients,
    components: int | None,
    storage: torch.dtype,
) -> Term:
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    C = cov[name].to(torch.float64)
    dtype = torch.promote_types(B.dtype, torch.float32)
    G = gradients[name].to(device=B.device, dtype=torch.float64, copy=True).div_(max(1, gradients.tokens(name)))
    A = A.detach().to(C.device, torch.float64)
    M = A @ C @ A.T * (float(layer.scaling[adapter]) ** 2 / max(1, cov.tokens(name)))
    if not (torch.isfinite(G).all() and torch.isfinite(M).all()):
        raise KoreError(f"{name}: its covariance or its output gradients hold NaN or infinity; capture them again")
    M = ((M + M.T) / 2).to(B.device, dtype)
    digest = hashlib.sha256()
    for values in (G.diagonal().to(dtype), M):
        digest.update(values.contiguous().cpu().numpy().tobytes())
    if components is None:
        return Term(name, layer, adapter, G.to(dtype), M, digest.hexdigest())
    storage = storage if storage == torch.bfloat16 else dtype
    return Term(name, layer, adapter, factored(G, components, dtype, storage), M, digest.hexdigest())
