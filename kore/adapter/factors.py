"""The frozen factors A of a model's layers, from their weights and the null space of their inputs."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from kore.adapter.config import KoreConfig
from kore.covariance import CovarianceSet
from kore.errors import KoreError, ModelError
from kore.models import linear_shape, named_linears
from kore.nullspace import null_space


def thin_init(weight: torch.Tensor, basis: torch.Tensor, scale: str = "sqrt") -> torch.Tensor:
    """A (r, d_in) float64 from the SVD of W0 U: A = √Σ Vᵀ Uᵀ (arXiv 2510.19316), or Vᵀ Uᵀ.

    svd(W0 U Uᵀ) = U* Σ (U V)ᵀ follows from svd(W0 U) = U* Σ Vᵀ, so a (d_out, r) problem takes the place of the
    paper's (d_out, d_in) one. Where W0 U has fewer than r non-zero singular values (d_out < r, or rank
    deficiency), the paper's A has rows of zeros, whose columns of B could never learn: V is completed to r
    orthonormal directions of the null space, and these rows get the smallest non-zero √σ (1 for W0 U = 0).

    Args:
        weight: W0 (d_out, d_in), any floating dtype and device; not changed.
        basis: U (d_in, r), orthonormal columns.
        scale: ``"sqrt"`` or ``"orthonormal"``.
    """
    basis = basis.to(device="cpu", dtype=torch.float64)
    d_out, r = weight.shape[0], basis.shape[1]
    thin = weight.detach().to(device="cpu", dtype=torch.float64) @ basis
    _, singular, vt = torch.linalg.svd(thin, full_matrices=d_out < r)
    if scale == "sqrt":
        peak = float(singular[0]) if singular.numel() else 0.0
        kept = singular[singular > max(thin.shape) * torch.finfo(torch.float64).eps * peak]
        rows = torch.full((r,), float(kept[-1]) if kept.numel() else 1.0, dtype=torch.float64)
        rows[: kept.numel()] = kept
        vt = rows.sqrt()[:, None] * vt
    return vt @ basis.mT


def compute_factors(
    model: nn.Module, names: Sequence[str], rank: int, cov: CovarianceSet | None, config: KoreConfig, progress: bool
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """A (r, d_in) float32 (float64 for a float64 layer) of every layer, and what is known of each null space.

    One null space is solved for each group of layers that share an input; layers are taken one after the other,
    so that besides the factors only one covariance and one weight are held in float64.
    """
    from tqdm import tqdm

    linears = named_linears(model)
    factors: dict[str, torch.Tensor] = {}
    notes: dict[str, dict[str, Any]] = {}
    with tqdm(total=len(names), desc="null spaces", unit="layer", disable=None if progress else True) as bar:
        for members, basis, note in _bases(linears, names, rank, cov, config):
            for name in members:
                dtype = torch.float64 if linears[name].weight.dtype == torch.float64 else torch.float32
                factors[name] = thin_init(_weight(name, linears[name]), basis, config.scale).to(dtype).contiguous()
                notes[name] = note
                bar.update()
    return {name: factors[name] for name in names}, {name: notes[name] for name in names}


def _bases(
    linears: dict[str, Any], names: Sequence[str], rank: int, cov: CovarianceSet | None, config: KoreConfig
) -> Iterator[tuple[list[str], torch.Tensor, dict[str, Any]]]:
    if config.constraint == "none":
        for members in _groups(names, cov):
            d_in = linear_shape(linears[members[0]])[1]
            yield members, _random_basis(members[0], d_in, rank, config.seed), {"method": "random"}
        return
    assert cov is not None
    short = []
    for members in _groups(names, cov):
        group = cov.group(members[0])
        if group.dim != linear_shape(linears[members[0]])[1]:
            raise ModelError(f"{members[0]}: the covariance is of d_in = {group.dim}, the layer is not; capture again")
        if group.tokens < group.dim:
            short.append(group)
        try:
            solved = null_space(cov[group.name], rank, config.solver, config.seed)
        except KoreError as error:
            raise KoreError(f"{group.name}: {error}") from None
        yield (
            members,
            solved.basis.cpu(),
            {
                "method": solved.method,
                "tokens": group.tokens,
                "energy": float(solved.eigenvalues.sum()),
                "energy_ratio": solved.energy_ratio,
                "residual": solved.residual,
                "null_dim": solved.null_dim,
            },
        )
    if short:
        warnings.warn(
            f"{short[0].name}: its covariance was captured on {short[0].tokens} tokens, fewer than d_in = "
            f"{short[0].dim} ({len(short)} such inputs): part of its null space is only what the data did not reach; "
            "capture more data",
            stacklevel=2,
        )


def _groups(names: Sequence[str], cov: CovarianceSet | None) -> list[list[str]]:
    """The layers by shared input; every layer by itself where no covariance says which share."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name if cov is None or name not in cov else cov.group(name).name, []).append(name)
    return list(groups.values())


def _random_basis(name: str, d_in: int, rank: int, seed: int) -> torch.Tensor:
    """A uniformly random r-dimensional subspace, the same for the same layer and seed on every machine."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.linalg.qr(torch.randn(d_in, rank, dtype=torch.float64, generator=generator)).Q


def _weight(name: str, linear: Any) -> torch.Tensor:
    """W0 (d_out, d_in) on the CPU: of a transposed, quantised or offloaded layer too."""
    from peft.utils.integrations import dequantize_module_weight
    from transformers.pytorch_utils import Conv1D

    with _loaded(linear):
        weight = linear.weight
        if weight.is_meta:
            raise ModelError(f"{name}: its weight is on the meta device; load the model with its weights")
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            raise ModelError(
                f"{name}: bitsandbytes packed its 4-bit weight for inference on this CPU, for good; "
                "load the model again for the adapter"
            )
        if type(weight).__module__.startswith("torchao."):
            weight = weight.dequantize()
        elif not weight.is_floating_point():
            weight = dequantize_module_weight(linear)
        weight = weight.detach().cpu()
    return weight.mT if isinstance(linear, Conv1D) else weight


@contextlib.contextmanager
def _loaded(linear: nn.Module) -> Iterator[None]:
    if hasattr(linear, "_hf_hook"):
        from accelerate.utils import align_module_device

        with align_module_device(linear):
            yield
    else:
        yield
