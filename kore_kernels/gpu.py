"""What every Triton backend needs: the architecture family, the interpreter's rules, and the launch itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from kore_kernels import dispatch

Config = TypeVar("Config")

# Bytes of shared memory one block may use. Family 80 also covers 8.6, 8.9 and 12.x, which have less than 8.0 has.
SHARED_MEMORY = {80: 101_376, 90: 232_448, 100: 232_448}
INTERPRETER = "interpreter"


def family(capability: int) -> int:
    """The architecture whose configurations a GPU of compute capability 10 * major + minor uses."""
    if capability == 90:
        return 90
    return 100 if 100 <= capability < 110 else 80


def pick(configs: Mapping[int | str, Config], tensor: Tensor) -> Config:
    """The configuration for the machine that ``tensor`` is on."""
    if dispatch.interpreting():
        return configs[INTERPRETER]
    if tensor.is_cuda:
        major, minor = torch.cuda.get_device_capability(tensor.device)
        return configs[family(10 * major + minor)]
    import triton

    return configs[family(triton.runtime.driver.active.get_current_target().arch)]


def dot_dtype(*tensors: Tensor) -> Any:
    """The dtype in which tiles of these tensors are multiplied: their common one, float32 if they differ.

    The interpreter multiplies bfloat16 bit patterns as if they were integers, so there every tile becomes float32.
    """
    import triton.language as tl

    names = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    dtypes = {tensor.dtype for tensor in tensors}
    return tl.float32 if dispatch.interpreting() or len(dtypes) > 1 else names.get(dtypes.pop(), tl.float32)


def launch(kernel: Any, programs: int, anchor: Tensor, *arguments: Any, **options: Any) -> None:
    """Run ``programs`` blocks of a Triton kernel on the device of ``anchor``; nothing to do for no blocks.

    Fused multiply-adds are asked for by name, because the default of Triton's option differs between its versions.
    """
    if programs:
        with torch.cuda.device_of(anchor):
            _run(kernel, (programs,), *arguments, enable_fp_fusion=True, **options)


def _launch(kernel: Any, grid: tuple[int], *arguments: Any, **options: Any) -> None:
    kernel[grid](*arguments, **options)


# The kernel audit puts a function here that compiles instead of running.
_run: Callable[..., None] = _launch
