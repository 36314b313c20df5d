"""symmetrize_: public function, argument checks and torch.library registration."""

from __future__ import annotations

import torch
from torch import Tensor

from kore_kernels import checks, dispatch


def symmetrize_(C: Tensor) -> Tensor:
    """Mirror the lower triangle: ``C[i, j] = C[j, i]`` for ``i < j``, in place, without a temporary of C's size.

    Args:
        C: (d, d), float32 or float64, contiguous. The lower triangle and the diagonal are left as they are.

    Returns:
        C.

    Raises:
        TypeError, ValueError: when C is not such a matrix; C is unchanged then.
    """
    checks.square_matrix("symmetrize_", C)
    torch.ops.kore.symmetrize_(C)
    return C


@torch.library.custom_op("kore::symmetrize_", mutates_args=("C",), schema="(Tensor(a!) C) -> ()")
def _symmetrize(C: Tensor) -> None:
    if C.numel():
        dispatch.select("symmetrize", C.device, C.dtype).symmetrize(C)


@_symmetrize.register_fake
def _(C) -> None:
    return None
