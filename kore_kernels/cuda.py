"""The compiled kernels for NVIDIA GPUs (``csrc/cuda``): whether they can run, and calls of them on tensors.

Calls go to the current stream and take their workspace from torch's allocator; nothing waits for the GPU.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from kore_kernels import extension, gpu

_DTYPES = {torch.bfloat16: 1, torch.float16: 2}


def refusal(device: torch.device) -> str | None:
    """Why the kernels cannot run on ``device``, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "the native backend runs on CPUs and NVIDIA GPUs"
    missing = absence()
    if missing:
        return missing
    major, minor = torch.cuda.get_device_capability(device)
    archs = architectures()
    if ("80" in archs and major >= 8) or ("90a" in archs and major == 9):
        return None
    compiled = ", ".join(f"sm_{arch}" for arch in archs)
    return f"the CUDA kernels were compiled for {compiled} (sm_80: or newer), the GPU is sm_{major}{minor}"


@cache
def absence() -> str | None:
    """What is missing whatever the device, or None."""
    if extension.refusal():
        return f"no compiled kernels ({extension.refusal()})"
    module = extension._module()
    if not hasattr(module, "CUDA_ARCHS"):
        return "this installation was compiled without CUDA kernels; KORE_BUILD=cuda compiles them"
    missing = module.cuda_missing()
    if missing:
        return f"no GPU can be used: {missing}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return None


def architectures() -> list[str]:
    """Those that the kernels were compiled for, such as ["80", "90a"]; none without CUDA kernels."""
    return [] if extension.refusal() else getattr(extension._module(), "CUDA_ARCHS", "").split()


def describe() -> str:
    """What the CUDA kernels were compiled for, or why they cannot run."""
    missing = absence()
    return missing or f"kernels for {', '.join(f'sm_{arch}' for arch in architectures())}; KORE_BACKEND=native opts in"


def suits(*tensors: Tensor | None) -> bool:
    """Whether the kernels multiply these: two-byte numbers of one dtype, and some."""
    given = [tensor for tensor in tensors if tensor is not None]
    return all(each.dtype in _DTYPES and each.dtype == given[0].dtype and each.numel() > 0 for each in given)


def readable(matrix: Tensor) -> Tensor:
    """``matrix`` (n, d), or a copy of it, whose rows are contiguous and begin at multiples of 16 bytes."""
    if gpu.tma_reads(matrix):
        return matrix
    return _aligned(matrix, *matrix.shape).copy_(matrix)


def covariance_update(C: Tensor, x: Tensor, alpha: float | Tensor, triangle: str) -> None:
    """One triangle of C (d, d) float32 += alpha * xᵀ x, for x (n, d) that is :func:`readable`."""
    module, (n, d) = extension._module(), x.shape
    factor = alpha.to(torch.float32) if isinstance(alpha, Tensor) else None
    with torch.cuda.device_of(C):
        space = _workspace(C, module.cuda_covariance_workspace(n, d))
        module.cuda_covariance_update(
            C.data_ptr(),
            d,
            x.data_ptr(),
            n,
            x.stride(0),
            _DTYPES[x.dtype],
            1.0 if isinstance(alpha, Tensor) else alpha,
            0 if factor is None else factor.data_ptr(),
            triangle == "upper",
            space.data_ptr(),
            space.numel(),
            _stream(C),
        )


def two_products(
    L: Tensor,
    R: Tensor,
    bias: Tensor | None = None,
    P: Tensor | None = None,
    Q: Tensor | None = None,
    scaling: float = 1.0,
    *,
    add: Tensor | None = None,
    columns: int | None = None,
) -> Tensor:
    """L R + bias + scaling P Q + add, each term but the first if given; without P and Q, scaling is L R's.

    Each factor is :func:`readable` or the transpose of what is, both left ones alike and both right ones; so is add.
    L may have more columns than R has rows, and P than Q, if those columns are zero. ``columns``: with zero columns
    beyond R's, up to this number.
    """
    m, n = L.shape[0], columns or R.shape[1]
    out = _aligned(L, m, n)
    if bias is not None:
        bias = bias.contiguous()
        bias = bias.clone() if bias.data_ptr() % 4 else bias
    module = extension._module()
    matrices = {name: _matrix(each) for name, each in (("out", out), ("L", L), ("P", P))}
    with torch.cuda.device_of(L):
        space = _workspace(L, module.cuda_two_products_workspace(*matrices.values()))
        module.cuda_two_products(
            matrices["out"],
            matrices["L"],
            _matrix(R),
            0 if bias is None else bias.data_ptr(),
            matrices["P"],
            _matrix(Q),
            float(scaling),
            _matrix(add),
            _DTYPES[L.dtype],
            space.data_ptr(),
            space.numel(),
            _stream(L),
        )
    return out


def _aligned(like: Tensor, rows: int, columns: int) -> Tensor:
    """Uninitialised, its rows as far apart as the next multiple of 16 bytes."""
    pitch = -columns % (16 // like.element_size()) + columns
    return like.new_empty(rows, pitch)[:, :columns]


def _matrix(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tensor.data_ptr(), *tensor.shape, *tensor.stride())


def _workspace(like: Tensor, size: int) -> Tensor:
    return like.new_empty(size, dtype=torch.uint8)


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream
