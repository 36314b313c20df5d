"""What the machine can do: its measured rates, and the shortest time a covariance update could take on it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kore.bench.timing import Clock
from kore.environment import environment
from kore.errors import KoreError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCHEMA = 1
_TRIES = 7


def name_of(dtype: torch.dtype) -> str:
    """``float32`` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def resolve_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device, else the CPU. Raises KoreError where the device is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise KoreError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise KoreError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise KoreError(f"device: {name} is not here; this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def describe(device: torch.device) -> dict[str, Any]:
    """The device by name, with the numbers that decide the speed of a kernel."""
    if device.type == "cpu":
        return {"device": "cpu", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }


def made_with(operation: str, device: torch.device) -> dict[str, Any]:
    """What a stored result says of the run that made it; ``operation`` is the one whose backend it names."""
    return {
        "schema": SCHEMA,
        "environment": environment(),
        "machine": describe(device),
        "backend": backend_of(operation, device),
    }


def backend_of(operation: str, device: torch.device) -> str:
    """The backend that runs an operation of ``kore_kernels`` on the device, by its name."""
    import kore_kernels

    forced = os.environ.get("KORE_BACKEND") or "auto"
    if forced != "auto":
        return forced
    wanted = f"{operation} on {device.type}"
    return next(name for name, info in kore_kernels.backends().items() if wanted in info.default_for)


@contextmanager
def settings(device: torch.device, backend: str | None = None, threads: int | None = None) -> Iterator[None]:
    """``KORE_BACKEND`` and torch's CPU threads for the length of a block; None leaves them as they are.

    Raises:
        KoreError: The backend cannot run on the device.
    """
    before, threads_before = os.environ.get("KORE_BACKEND"), torch.get_num_threads()
    try:
        if backend is not None:
            os.environ["KORE_BACKEND"] = backend
            _check_backend(device)
        if threads is not None:
            torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(threads_before)
        if before is None:
            os.environ.pop("KORE_BACKEND", None)
        else:
            os.environ["KORE_BACKEND"] = before


def _check_backend(device: torch.device) -> None:
    from kore_kernels import covariance_update_

    try:
        covariance_update_(torch.zeros(1, 1, device=device), torch.zeros(1, 1, device=device))
    except (RuntimeError, ValueError) as error:
        raise KoreError(str(error).splitlines()[0]) from None


@dataclass(frozen=True)
class Roofline:
    """Measured rates of a device.

    Attributes:
        bytes_per_second: Of a large copy, read and written bytes counted.
        flops_per_second: Of a large library matrix product, by dtype name. For float32 on a GPU the most of that rate
            ("float32 units"), a third of TF32's and a sixth of bfloat16's: so many products make one of float32 grade.
    """

    bytes_per_second: float
    flops_per_second: dict[str, float]

    def floor(self, d: int, n: int, dtype: torch.dtype) -> tuple[float, str]:
        """Seconds below which no update of C (d, d) with x (n, d) can come, and what sets them: memory or compute.

        n d (d + 1) flops, and the lower triangle of a float32 C read and written and x read, each once.
        """
        traffic = 4.0 * d * (d + 1) + n * d * dtype.itemsize
        memory, compute = traffic / self.bytes_per_second, n * d * (d + 1) / self.flops_per_second[name_of(dtype)]
        return max(memory, compute), "memory" if memory > compute else "compute"

    def best(self, other: Roofline) -> Roofline:
        """The higher rate of each kind: what else ran on the machine can only lower a rate."""
        flops = {name: max(rate, other.flops_per_second[name]) for name, rate in self.flops_per_second.items()}
        return Roofline(max(self.bytes_per_second, other.bytes_per_second), flops)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_roofline(clock: Clock, dtypes: Sequence[torch.dtype], quick: bool = False) -> Roofline:
    """Measure the device of ``clock``: a copy far larger than its caches, and large products by its libraries."""
    device = clock.device
    gpu = device.type == "cuda"
    size = (2**31 if gpu else 2**28) // (8 if quick else 1)
    bandwidth = _copy_rate(clock, size)
    rates = {
        name_of(dtype): _product_rate(clock, dtype, (8192 if gpu else 2048) // (4 if quick else 1)) for dtype in dtypes
    }
    if gpu and "float32" in rates:
        rates["float32 units"], rates["tf32"] = rates["float32"], _tf32_rate(clock)
        bf16 = rates.get("bfloat16") or _product_rate(clock, torch.bfloat16, 8192)
        rates["float32"] = max(rates["float32 units"], rates["tf32"] / 3, bf16 / 6)
    return Roofline(bandwidth, rates)


def _copy_rate(clock: Clock, size: int) -> float:
    """byte/s, read and written bytes counted, of a copy of ``size`` bytes."""
    source = torch.ones(size // 4, dtype=torch.float32, device=clock.device)
    target = torch.zeros_like(source)
    times = [clock.milliseconds(lambda: target.copy_(source)) for _ in range(_TRIES + 1)][1:]
    return 2e3 * size / min(times)


def _product_rate(clock: Clock, dtype: torch.dtype, size: int) -> float:
    """flop/s of the fastest library product of two (size, size) matrices."""
    torch.manual_seed(0)
    a, b = (torch.randn(size, size, device=clock.device).to(dtype) for _ in range(2))
    times = [clock.milliseconds(lambda: torch.mm(a, b)) for _ in range(_TRIES + 1)][1:]
    if clock.device.type == "cpu" and dtype == torch.float32:
        times += _blas_times(clock, a, b)
    return 2e3 * size**3 / min(times)


def _blas_times(clock: Clock, a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """The same product by SciPy's BLAS, which on some processors is faster than torch's."""
    try:
        from scipy.linalg.blas import sgemm
    except ImportError:
        return []
    left, right = a.numpy().T, b.numpy().T
    return [clock.milliseconds(lambda: sgemm(1.0, left, right)) for _ in range(_TRIES + 1)][1:]


def _tf32_rate(clock: Clock) -> float:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return _product_rate(clock, torch.float32, 8192)
    finally:
        torch.set_float32_matmul_precision(before)
