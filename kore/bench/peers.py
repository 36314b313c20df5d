"""The ways to add the covariance of x (n, d) to C (d, d) that ``covariance_update_`` is measured beside.

Each peer says why it cannot run on a device in a dtype, or gives a call without arguments that adds to C once.
Conversions that a user of the peer would have done before are done before the clock starts.
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kore.bench.official import SAMPLES, official_term
from kore.bench.timing import Step

OURS = "covariance_update_"
ADDMM = "C.addmm_(x.T, x)"


@dataclass(frozen=True)
class Peer:
    """One way to do it.

    Attributes:
        name: As shown.
        refusal: Why it cannot run on a device in a dtype, or None.
        prepare: From C and x, the call that adds once.
        scaled: It divides x by |max x| first.
        factor: What it multiplies the sum with.
    """

    name: str
    refusal: Callable[[torch.device, torch.dtype], str | None]
    prepare: Callable[[Tensor, Tensor], Step]
    scaled: bool = False
    factor: float = 1.0

    def terms(self, x: Tensor) -> Tensor:
        """The rows, in float64, whose covariance times ``factor`` one call adds."""
        rows = x.double()
        return rows / rows.max().abs() if self.scaled else rows


def _always(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def _ours(C: Tensor, x: Tensor) -> Step:
    from kore_kernels import covariance_update_

    return lambda: covariance_update_(C, x)


def _plain(C: Tensor, x: Tensor) -> Step:
    def step() -> None:
        C.add_(x.T @ x)

    return step


def _addmm(C: Tensor, x: Tensor) -> Step:
    x = x.to(C.dtype)
    return lambda: C.addmm_(x.T, x)


def _wide_addmm(C: Tensor, x: Tensor) -> Step:
    return lambda: torch.addmm(C, x.T, x, out_dtype=C.dtype, out=C)  # type: ignore[call-overload]


def _wide_mm(C: Tensor, x: Tensor) -> Step:
    product = torch.empty_like(C)

    def step() -> None:
        torch.mm(x.T, x, out_dtype=C.dtype, out=product)  # type: ignore[call-overload]
        C.add_(product)

    return step


def _on_two_byte_gpu(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" or dtype.itemsize != 2:
        return "a GPU's product of two-byte matrices with a float32 result"
    return None


def _ssyrk(C: Tensor, x: Tensor) -> Step:
    from scipy.linalg.blas import ssyrk

    matrix, rows = C.numpy().T, x.numpy().T  # as Fortran sees them: the lower triangle of C is its upper one
    limit = _blas_threads(torch.get_num_threads())

    def step() -> None:
        with limit():
            ssyrk(1.0, rows, beta=1.0, c=matrix, overwrite_c=1)

    return step


def _no_ssyrk(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu" or dtype != torch.float32:
        return "BLAS works on float32 in the CPU's memory"
    if importlib.util.find_spec("scipy") is None:
        return "scipy is not installed"
    return None


def _blas_threads(count: int) -> Callable[[], AbstractContextManager[Any]]:
    """Gives BLAS as many threads as torch has, where threadpoolctl is there to tell it."""
    if importlib.util.find_spec("threadpoolctl") is None:
        return nullcontext
    from threadpoolctl import ThreadpoolController

    controller = ThreadpoolController().select(internal_api="openblas")
    if all(info["num_threads"] == count for info in controller.info()):
        return nullcontext
    return lambda: controller.limit(limits=count)


def _official(C: Tensor, x: Tensor) -> Step:
    def step() -> None:
        C.add_(official_term(x))

    return step


def _corda(C: Tensor, x: Tensor) -> Step:
    """The forward hook that PEFT's own CorDA puts on a layer, taken from it and called on x."""
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import calib_cov_distribution

    layer: Any = torch.nn.Linear(C.shape[0], 1, bias=False)
    config = LoraConfig(target_modules=["layer"], init_lora_weights="corda", corda_config=CordaConfig())
    hooks: list[Any] = []

    def take() -> None:
        hooks.extend(layer._forward_hooks.values())
        layer.sample_count = 1

    calib_cov_distribution(torch.nn.Sequential(OrderedDict(layer=layer)), config, take, None, None)
    layer.covariance_matrix = C
    (hook,) = hooks

    def step() -> None:
        hook(layer, (x,), None)

    return step


def _no_corda(device: torch.device, dtype: torch.dtype) -> str | None:
    missing = [package for package in ("peft", "attr") if importlib.util.find_spec(package) is None]
    return f"{' and '.join(missing)}, which it needs, not installed" if missing else None


def _quack(C: Tensor, x: Tensor) -> Step:
    from quack.gemm_interface import gemm_symmetric_out

    return lambda: gemm_symmetric_out(x.T, x, C, C=C)


def _no_quack(device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("quack") is None:
        return "quack is not installed"
    return _on_two_byte_gpu(device, dtype)


PEERS = (
    Peer(OURS, _always, _ours),
    Peer(ADDMM, _always, _addmm),
    Peer("C += x.T @ x", _always, _plain),
    Peer("SciPy ssyrk", _no_ssyrk, _ssyrk),
    Peer("addmm to float32", _on_two_byte_gpu, _wide_addmm),
    Peer("mm to float32, add", _on_two_byte_gpu, _wide_mm),
    Peer("quack symmetric", _no_quack, _quack),
    Peer("official hook", _always, _official, scaled=True, factor=1 / SAMPLES),
    Peer("PEFT CorDA hook", _no_corda, _corda, scaled=True),
)


def select(device: torch.device, dtype: torch.dtype) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can run, ours and ``addmm_`` first, and why the others cannot."""
    reasons = {peer.name: peer.refusal(device, dtype) for peer in PEERS}
    running = [peer for peer in PEERS if reasons[peer.name] is None]
    return running, {name: reason for name, reason in reasons.items() if reason}
