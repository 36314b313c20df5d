"""Half of a symmetric matrix: in a buffer of its own, beside another one's half, and row after row in a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Half = Literal["lower", "upper"]
HALVES: tuple[Half, ...] = ("lower", "upper")
_BLOCK = 1 << 22  # entries


@dataclass(frozen=True)
class Triangle:
    """One triangle, diagonal included, of a symmetric matrix; the other half of the memory may be another's.

    Attributes:
        matrix: (d, d), contiguous.
        half: ``"lower"`` or ``"upper"``: which entries of ``matrix`` count.
    """

    matrix: torch.Tensor
    half: Half = "lower"

    def full(self) -> torch.Tensor:
        """The symmetric matrix, as new memory on the same device."""
        import torch

        from kore_kernels import symmetrize_

        return symmetrize_(self.matrix.clone(memory_format=torch.contiguous_format), triangle=self.half)

    def assign(self, full: torch.Tensor) -> None:
        """Take the values of a symmetric matrix (d, d) of any dtype, on any device."""
        start = 0
        for block, mine in self.blocks():
            rows, columns = block.shape
            block.copy_(full[start : start + rows, :columns].to(block).where(mine, block))
            start += rows

    def blocks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Blocks of bounded size that cover the rows of the lower triangle, each with a mask of the entries in it.

        They are views; of an upper triangle, they are the transposed ones, so that two triangles of one size can be
        gone through together.
        """
        import torch

        lower = self.matrix if self.half == "lower" else self.matrix.mT
        step = max(1, _BLOCK // max(1, len(lower)))
        for start in range(0, len(lower), step):
            block = lower[start : start + step, : start + step]
            yield block, block.new_ones(block.shape, dtype=torch.bool).tril(start)

    def packed(self) -> torch.Tensor:
        """The d (d + 1) / 2 entries row after row, on the CPU."""
        import torch

        host, lower = self.matrix.cpu(), self.half == "lower"
        rows = [row[: i + 1] if lower else row[i:] for i, row in enumerate(host)]
        return torch.cat(rows) if rows else host.reshape(0)


def unpack(packed: torch.Tensor, dim: int, half: Half) -> torch.Tensor:
    """The symmetric matrix (dim, dim) of which :meth:`Triangle.packed` made ``packed``."""
    from kore_kernels import symmetrize_

    full = packed.new_empty(dim, dim)
    lengths = range(1, dim + 1) if half == "lower" else range(dim, 0, -1)
    for i, (row, part) in enumerate(zip(full, packed.split(list(lengths)))):
        (row[: i + 1] if half == "lower" else row[i:]).copy_(part)
    return symmetrize_(full, triangle=half)
