"""Every operation on every backend that can run here, beside float64: ``python -m kore_kernels``, a few seconds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kore_kernels import checks, dispatch, extension
from kore_kernels.covariance_update.op import covariance_update_
from kore_kernels.lora_fa_linear.op import lora_fa_linear
from kore_kernels.lora_fa_linears.op import lora_fa_linears
from kore_kernels.symmetrize.op import symmetrize_

# Error over the largest number of the result. float32 has room for products that the hardware rounds to TF32's inputs
# in pieces; the others for the rounding of h and of the output.
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}
_ROWS, _D_IN, _D_OUT, _RANK = 150, 136, 72, 24  # uneven for every tile


@dataclass(frozen=True)
class Result:
    """One operation in one dtype: the error, or why it could not be computed."""

    backend: str
    operation: str
    dtype: torch.dtype
    error: float
    failure: str | None = None

    @property
    def passed(self) -> bool:
        return self.failure is None and self.error <= ALLOWED[self.dtype]

    def __str__(self) -> str:
        name = f"{self.operation} in {str(self.dtype).removeprefix('torch.')}"
        if self.failure:
            return f"{name}: {self.failure}"
        return f"{name}: error {self.error:.1e}, at most {ALLOWED[self.dtype]:.1e} is right"


def run() -> list[Result]:
    """A result for each operation, dtype and backend. Calls that fail are results too."""
    return [_attempt(*case) for case in _cases()]


def summary(results: list[Result]) -> dict[str, list[Result]]:
    """The results of each backend, as it is called here: ``native (avx2)``, ``triton on cuda``."""
    rows: dict[str, list[Result]] = {}
    for result in results:
        rows.setdefault(result.backend, []).append(result)
    return rows


_Call = Callable[[torch.device, torch.dtype], Iterator[tuple[Tensor, Tensor]]]


def _cases() -> Iterator[tuple[str, dict[str, str], str, _Call, torch.device, torch.dtype]]:
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda", torch.cuda.current_device()))
    for backend in dispatch.BACKENDS:
        for device in devices:
            for name, settings in _variants(backend, device):
                for operation, call in _OPERATIONS.items():
                    for dtype in ALLOWED:
                        if dispatch._refusal(backend, device, dtype) is None:
                            yield name, {"KORE_BACKEND": backend, **settings}, operation, call, device, dtype


def _variants(backend: str, device: torch.device) -> list[tuple[str, dict[str, str]]]:
    if backend == "native" and device.type == "cpu" and extension.refusal() is None:
        try:
            levels = extension.ISAS[: extension.isa() + 1]
        except (ValueError, RuntimeError):  # of KORE_CPU_ISA, which the calls will name
            return [("native", {})]
        return [(f"native ({level})", {"KORE_CPU_ISA": level}) for level in levels]
    return [(backend if device.type == "cpu" else f"{backend} on {device.type}", {})]


def _attempt(
    name: str, settings: dict[str, str], operation: str, call: _Call, device: torch.device, dtype: torch.dtype
) -> Result:
    try:
        with _environment(settings), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            error = max(_error(found, expected) for found, expected in call(device, dtype))
    except Exception as failure:  # a broken compiler or driver raises what it likes; the rest is still of interest
        return Result(name, operation, dtype, float("inf"), f"{type(failure).__name__}: {failure}")
    return Result(name, operation, dtype, error)


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _error(found: Tensor, expected: Tensor) -> float:
    difference = (found.detach().cpu().double() - expected).abs().max().item() / expected.abs().max().item()
    return difference if difference == difference else float("inf")


def _random(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float32, device="cpu").to(device, dtype)


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().cpu().double() for tensor in tensors)


def _covariance_update(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    x = _random(_ROWS, _D_IN, device=device, dtype=dtype)
    C = _random(_D_IN, _D_IN, device=device, dtype=torch.float32)
    mask = torch.arange(_ROWS, device=device) % 3 > 0
    weight = _random(_ROWS, device=device, dtype=torch.float32)
    # C and its sums are float32, whatever x is: what they are allowed follows from that.
    widen = ALLOWED[dtype] / ALLOWED[torch.float32]
    triangles: tuple[checks.Triangle, ...] = ("lower", "upper")
    for triangle in triangles:
        keep = torch.tril if triangle == "lower" else torch.triu
        for m, w in ((None, None), (mask, None), (mask, weight)):
            found = covariance_update_(C.clone(), x, mask=m, weight=w, alpha=0.5, triangle=triangle)
            wide, factor = _wide(x)[0], torch.ones(_ROWS, dtype=torch.float64)
            factor = factor if m is None else factor * _wide(m)[0]
            factor = factor if w is None else factor * _wide(w)[0]
            before = _wide(C)[0]
            expected = before + keep(0.5 * wide.T @ (factor[:, None] * wide))
            yield expected + (found.cpu().double() - expected) * widen, expected


def _symmetrize(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    C = _random(_D_IN, _D_IN, device=device, dtype=torch.float32)
    wide = _wide(C)[0]
    yield symmetrize_(C.clone(), triangle="lower"), wide.tril() + wide.tril(-1).T
    yield symmetrize_(C.clone(), triangle="upper"), wide.triu() + wide.triu(1).T


def _lora_fa_linear(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    x, g = (_random(_ROWS, width, device=device, dtype=dtype) for width in (_D_IN, _D_OUT))
    W, bias = _random(_D_OUT, _D_IN, device=device, dtype=dtype), _random(_D_OUT, device=device, dtype=dtype)
    A, B = _random(_RANK, _D_IN, device=device, dtype=dtype), _random(_D_OUT, _RANK, device=device, dtype=dtype)
    x.requires_grad_()
    B.requires_grad_()
    x_, W_, bias_, A_, B_, g_ = _wide(x, W, bias, A, B, g)
    for merged in (False, True):
        y = lora_fa_linear(x, W, bias, A, B, scaling=0.25, merged=merged)
        dx, dB = torch.autograd.grad(y, (x, B), g)
        yield y, x_ @ W_.T + bias_ + 0.25 * (x_ @ A_.T) @ B_.T
        yield dx, g_ @ W_ + 0.25 * (g_ @ B_) @ A_
        yield dB, 0.25 * g_.T @ (x_ @ A_.T)


def _lora_fa_linears(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    x, U = _random(_ROWS, _D_IN, device=device, dtype=dtype), _random(_D_IN, _RANK, device=device, dtype=dtype)
    widths = (_D_OUT, 40)
    gs = [_random(_ROWS, width, device=device, dtype=dtype) for width in widths]
    Ws = [_random(width, _D_IN, device=device, dtype=dtype) for width in widths]
    Rs = [_random(_RANK, _RANK, device=device, dtype=dtype) / _RANK for _ in widths]
    Bs = [_random(width, _RANK, device=device, dtype=dtype).requires_grad_() for width in widths]
    x.requires_grad_()
    ys = lora_fa_linears(x, Ws, [None, None], U, Rs, Bs, scaling=0.25)
    dx, *dBs = torch.autograd.grad(ys, (x, *Bs), gs)
    x_, U_ = _wide(x, U)
    dx_ = torch.zeros_like(x_)
    for y, g, W, R, B, dB in zip(ys, gs, Ws, Rs, Bs, dBs):
        g_, W_, R_, B_ = _wide(g, W, R, B)
        h = x_ @ U_ @ R_.T
        dx_ += g_ @ W_ + 0.25 * g_ @ B_ @ R_ @ U_.T
        yield y, x_ @ W_.T + 0.25 * h @ B_.T
        yield dB, 0.25 * g_.T @ h
    yield dx, dx_


_OPERATIONS: dict[str, _Call] = {
    "covariance_update": _covariance_update,
    "symmetrize": _symmetrize,
    "lora_fa_linear": _lora_fa_linear,
    "lora_fa_linears": _lora_fa_linears,
}
