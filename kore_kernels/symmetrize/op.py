"""symmetrize_: public function, argument checks and torch.library registration."""

from __future__ import annotations

import torch
from torch import Tensor

from kore_kernels import checks, dispatch


def symmetrize_(C: Tensor, triangle: checks.Triangle = "lower") -> Tensor:
    """Mirror one triangle onto the other, in place, without a temporary of C's size.

    Args:
        C: (d, d), float32 or float64, contiguous.
        triangle: the one that is kept, with the diagonal: "lower" sets ``C[i, j] = C[j, i]`` for ``i < j``, "upper"
            for ``i > j``.

    Returns:
        C.

    Raises:
        TypeError, ValueError: when C is not such a matrix or there is no such triangle; C is unchanged then.
    """
    checks.square_matrix("symmetrize_", C)
    checks.triangle("symmetrize_", triangle)
    torch.ops.kore.symmetrize_(C, triangle)
    return C


@torch.library.custom_op("kore::symmetrize_", mutates_args=("C",), schema="(Tensor(a!) C, str triangle) -> ()")
def _symmetrize(C: Tensor, triangle: str) -> None:
    if C.numel():
        dispatch.select("symmetrize", C.device, C.dtype).symmetrize(C, triangle)


@_symmetrize.register_fake
def _(C, triangle) -> None:
    return None
