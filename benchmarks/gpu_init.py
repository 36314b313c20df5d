"""The initialisation's correctness in the GPU suite: null spaces, factors, and an adapter beside the CPU's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import kore
from benchmarks.gpu_covariance import BF16, FP32, one_line
from kore.adapter.compute import compute_factors
from kore.adapter.factors import thin_init
from kore.bench.check import difference
from kore.bench.init import RATIO_GOAL, graded_covariance
from kore.bench.llava import TINY, random_batches, random_llava
from kore.bench.machine import name_of
from kore.covariance import CovarianceSet
from kore.models import language_model_linears, model_fingerprint
from kore.nullspace import energy_ratio, null_space

if TYPE_CHECKING:
    from benchmarks.gpu_suite import Suite

FP64 = torch.float64
METHODS = ("auto", "randomized", "eigh")
EXACT = 1e-12  # identities in float64
NEAR = 1e-9  # float64 by other algorithms


@dataclass(frozen=True)
class Spectrum:
    """A covariance whose null space is checked: graded over ``condition``, of ``tokens`` random rows, or zero."""

    d: int
    rank: int
    dtype: torch.dtype
    condition: float | None = None
    tokens: int | None = None

    def __str__(self) -> str:
        kind = "zero"
        if self.condition is not None:
            kind = f"condition {self.condition:g}, outliers"
        elif self.tokens is not None:
            kind = f"{self.tokens} random tokens"
        return f"{kind}, {name_of(self.dtype)}, d={self.d}, r={self.rank}"

    @property
    def empty(self) -> bool:
        """Whether the r smallest eigenvalues are zero."""
        return self.condition is None and (self.tokens or 0) <= self.d - self.rank

    def make(self, device: torch.device) -> Tensor:
        if self.condition is not None:
            return graded_covariance(self.d, self.condition, 0, device, self.dtype)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.tokens or 0, self.d, dtype=FP64, generator=generator).to(device)
        return (x.mT @ x).to(self.dtype)


def spectra(quick: bool) -> list[Spectrum]:
    """The telling ones first."""
    d, r, wide, wide_r = (264, 20, 272, 24) if quick else (1024, 64, 4096, 235)
    return [
        Spectrum(wide, wide_r, FP32, condition=1e9),
        *(Spectrum(d, r, FP64, condition=condition) for condition in (1e2, 1e6, 1e9, 1e12)),
        *(Spectrum(d, r, FP32, condition=condition) for condition in (1e4, 1e9)),
        Spectrum(d, r, FP64, tokens=4 * d),
        Spectrum(d, r, FP32, tokens=d + d // 8),
        Spectrum(d, r, FP64, tokens=d // 2),
        Spectrum(d, r, FP32, tokens=d // 2),
        Spectrum(d, r, FP32),
    ]


def correctness(suite: Suite) -> dict[str, Any]:
    """Null spaces of every spectrum by every method, factors of all kinds of weights, the adapter of a small model."""
    spaces: list[dict[str, Any]] = []
    stored: dict[str, Any] = {"null spaces": spaces, "factors": []}
    suite.result["init correctness"] = stored
    planned = spectra(suite.quick)
    for index, spectrum in enumerate(planned):
        if suite.left() < 5:
            suite.miss(f"init: {len(planned) - index} spectra")
            break
        try:
            spaces.extend(_spaces(spectrum, suite.device))
        except Exception as error:
            suite.fail(f"init, {spectrum}: {one_line(error)}")
            continue
        for row in spaces[-len(METHODS) :]:
            for fault in row["faults"]:
                suite.fail(f"init, {spectrum}, {row['asked']}: {fault}")
    for part, check in (("factors", _factors), ("adapter", _adapter)):
        if suite.left() < 3:
            suite.miss(f"init: {part}")
            continue
        try:
            stored[part] = check(suite)
        except Exception as error:
            suite.fail(f"init, {part}: {one_line(error)}")
    worst = max((row["energy_ratio"] for row in spaces if row["energy_ratio"] is not None), default=None)
    print(f"init: {len(spaces)} null spaces, energy ratio at most {worst}", flush=True)
    return stored


def _spaces(spectrum: Spectrum, device: torch.device) -> Iterator[dict[str, Any]]:
    """One row for each method; energies are held against the spectrum by float64 eigvalsh on the same device."""
    C = spectrum.make(device)
    before, trace = C.clone(), float(C.double().trace())
    cpu = null_space(C.cpu(), spectrum.rank) if spectrum.d <= 1024 else None
    for method in METHODS:
        found, again = (null_space(C, spectrum.rank, method) for _ in range(2))
        U, energy, faults = found.basis, float(found.eigenvalues.sum()), []
        if U.device != C.device or U.dtype != FP64 or U.shape != (spectrum.d, spectrum.rank):
            faults.append(f"the basis is {U.dtype} {tuple(U.shape)} on {U.device}")
            U = U.to(C.device, FP64)
        apart = float((U.mT @ U - torch.eye(spectrum.rank, dtype=FP64, device=device)).abs().max())
        if not apart <= EXACT:
            faults.append(f"UᵀU is {apart:.1e} away from the identity")
        if not torch.equal(found.basis, again.basis):
            faults.append("the same call gave other bits")
        rayleigh = float((U * (C.double() @ U)).sum())
        if not abs(rayleigh - energy) <= NEAR * abs(energy) + EXACT * trace:
            faults.append(f"says energy {energy:.6e}, holds {rayleigh:.6e}")
        ratio = None
        if spectrum.empty:
            floor = spectrum.rank * torch.finfo(C.dtype).eps * trace
            if not abs(rayleigh) <= floor or found.null_dim != spectrum.rank:
                faults.append(f"energy {rayleigh:.1e} where there is none, null_dim {found.null_dim}")
        else:
            ratio = energy_ratio(C, U)
            if not ratio <= RATIO_GOAL:
                faults.append(f"energy ratio {ratio:.4f}, allowed are {RATIO_GOAL}")
            if cpu is not None and not abs(rayleigh / float(cpu.eigenvalues.sum()) - 1) <= RATIO_GOAL - 1:
                faults.append(f"energy {rayleigh:.4e}, on the CPU {float(cpu.eigenvalues.sum()):.4e}")
        if not torch.equal(C, before):
            faults.append("C was changed")
        yield {
            **asdict(spectrum),
            "dtype": name_of(spectrum.dtype),
            "asked": method,
            "method": found.method,
            "iterations": found.iterations,
            "energy_ratio": ratio,
            "said": found.energy_ratio,
            "faults": faults,
        }


def _factors(suite: Suite) -> list[dict[str, Any]]:
    """thin_init on the device: the identities in float64, the full SVD of W0 P, and the CPU's factor."""
    d, r = (96, 12) if suite.quick else (1024, 64)
    C, rows = graded_covariance(d, 1e6, 0, suite.device, FP64), []
    U = null_space(C, r, "eigh").basis
    for d_out, dtype in ((2 * d, BF16), (d, FP32), (d, FP64), (r // 2, FP32)):
        torch.manual_seed(d_out)
        weight = (torch.randn(d_out, d, device=suite.device) / d**0.5).to(dtype)
        A, cpu = thin_init(weight, U), thin_init(weight.cpu(), U.cpu())
        _, singular, Vh = torch.linalg.svd(weight.double() @ U @ U.mT, full_matrices=False)
        kept = min(d_out, r)
        full = singular[:kept].sqrt()[:, None] * Vh[:kept]
        leak, allowed = float((A @ C).norm() / A.norm()), 1.01 * float(torch.linalg.eigvalsh(C)[r - 1])
        errors = {
            "outside of U": difference(A @ U @ U.mT, A),
            "full SVD": difference(A[:kept].mT @ A[:kept], full.mT @ full),
            "CPU": difference(A.cpu()[:kept].mT @ A.cpu()[:kept], cpu[:kept].mT @ cpu[:kept]),
        }
        limits = {"outside of U": EXACT, "full SVD": NEAR, "CPU": NEAR}
        where = f"init, factor of {name_of(dtype)} W0 ({d_out}, {d})"
        for name, error in errors.items():
            if not error <= limits[name]:
                suite.fail(f"{where}: {name}: relative error {error:.1e}, allowed are {limits[name]:.0e}")
        if not leak <= allowed + EXACT * float(C.norm()):
            suite.fail(f"{where}: ‖A C‖/‖A‖ is {leak:.1e}, allowed are {allowed:.1e}")
        rows.append({"d_out": d_out, "d": d, "rank": r, "dtype": name_of(dtype), "leak": leak, "errors": errors})
    return rows


def _adapter(suite: Suite) -> dict[str, Any]:
    """All factors of a small LLaVA on the device, captured there, beside those that the CPU makes of the same sums."""
    batches = random_batches(TINY, 4, 2, 64, FP32)
    cov = kore.capture_covariance(random_llava(TINY, suite.device, FP32), batches, progress=False)
    same = CovarianceSet({group.name: cov[group.name].cpu() for group in cov.groups}, cov.groups, cov.fingerprint)
    config, made = kore.KoreConfig(rank=12, solver="eigh"), []
    for device, sums in ((suite.device, cov), (torch.device("cpu"), same)):
        model = random_llava(TINY, suite.device, FP32).to(device)
        identity = model_fingerprint(model)
        names = language_model_linears(model)
        made.append(compute_factors(model, names, 12, sums, config, identity, progress=False, distributed=False)[0])
    ours, cpu = made
    errors = {name: difference(A.mT @ A, cpu[name].double().mT @ cpu[name].double()) for name, A in ours.items()}
    name = max(errors, key=lambda key: errors[key])
    if not errors[name] <= 1e-4:
        suite.fail(f"init, adapter: {name}: {errors[name]:.1e} away from the CPU's")
    return {"layers": len(errors), "largest_difference": errors[name]}
