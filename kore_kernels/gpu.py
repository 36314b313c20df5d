"""What every Triton backend needs: the architecture family, the interpreter's rules, TMA, and the launch itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from kore_kernels import dispatch

Config = TypeVar("Config")

# Bytes of shared memory one block may use. Family 80 also covers 8.6, 8.9 and 12.x, which have less than 8.0 has.
SHARED_MEMORY = {80: 101_376, 90: 232_448, 100: 232_448}
INTERPRETER = "interpreter"
# Multiprocessors of the A100, H200 and B200, for where there is no device to ask.
MULTIPROCESSORS: dict[int | str, int] = {INTERPRETER: 10, 80: 108, 90: 132, 100: 148}


def family(capability: int) -> int:
    """The architecture whose configurations a GPU of compute capability 10 * major + minor uses."""
    if capability == 90:
        return 90
    return 100 if 100 <= capability < 110 else 80


def pick(configs: Mapping[int | str, Config], tensor: Tensor) -> Config:
    """The configuration for the machine that ``tensor`` is on."""
    return configs[_machine(tensor)]


def multiprocessors(tensor: Tensor) -> int:
    """How many the machine that ``tensor`` is on has."""
    if tensor.is_cuda:
        return torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return MULTIPROCESSORS[_machine(tensor)]


def _machine(tensor: Tensor) -> int | str:
    if dispatch.interpreting():
        return INTERPRETER
    if tensor.is_cuda:
        major, minor = torch.cuda.get_device_capability(tensor.device)
        return family(10 * major + minor)
    import triton

    return family(triton.runtime.driver.active.get_current_target().arch)


def dot_dtype(*tensors: Tensor) -> Any:
    """The dtype in which tiles of these tensors are multiplied: their common one, float32 if they differ.

    The interpreter multiplies bfloat16 bit patterns as if they were integers, so there every tile becomes float32.
    """
    import triton.language as tl

    names = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    dtypes = {tensor.dtype for tensor in tensors}
    return tl.float32 if dispatch.interpreting() or len(dtypes) > 1 else names.get(dtypes.pop(), tl.float32)


def library_multiplies(*operands: Tensor) -> bool:
    """Whether cuBLAS should multiply these: two-byte operands of one dtype, at which its main loop is far ahead."""
    dtype = operands[0].dtype
    return dtype.itemsize == 2 and all(each.dtype == dtype for each in operands)


def has_tma(tensor: Tensor) -> bool:
    """Whether the machine has a tensor memory accelerator, and this Triton can ask for it: 3.4 brought descriptors."""
    return _machine(tensor) in (INTERPRETER, 90, 100) and _has_descriptors()


@cache
def _has_descriptors() -> bool:
    return importlib.util.find_spec("triton.tools.tensor_descriptor") is not None


def tma_reads(matrix: Tensor) -> bool:
    """Whether the tensor memory accelerator can fetch tiles of ``matrix`` (n, d) where it lies.

    It wants rows that do not overlap, and start at multiples of 16 bytes.
    """
    row, column = matrix.stride()
    return column == 1 and row >= matrix.shape[1] and not (matrix.data_ptr() | row * matrix.element_size()) % 16


def vectors_read(matrix: Tensor) -> bool:
    """Whether 16-byte loads through pointers can. Triton must know it to use them, and knows multiples of 16."""
    row, column = matrix.stride()
    return column == 1 and not (matrix.data_ptr() | row | matrix.shape[1]) % 16


def descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    """Describes ``matrix`` to the tensor memory accelerator, which fetches (rows, columns) tiles, zeros outside it."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


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
