"""The dropout mask of lora_fa_linear: a function of a seed and a place, the same bits in every backend.

Element (i, j) is kept if word j % 4 of Philox 4x32-10 (Salmon et al. 2011) for the key ``seed`` and the counter
(j // 4, i, 0, 0), without its lowest bit, is at least ``threshold(p)``. So one evaluation serves four columns, nothing
is stored for the backward pass, and where a row is computed does not change it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFF_FFFF
_MULTIPLIERS = (0xD251_1F53, 0xCD9E_8D57)
_KEY_STEPS = (0x9E37_79B9, 0xBB67_AE85)
_ROUNDS = 10
# Elements whose words are held at a time, each in eight bytes.
_BLOCK = 2**20


def threshold(p: float) -> int:
    """The 31-bit words below it are dropped; a p below 1 always leaves some."""
    return min(round(p * 2**31), 2**31 - 1)


def keep(seed: Tensor, p: float, first: int, rows: int, columns: int) -> Tensor:
    """(rows, columns) bool: which elements of the rows from ``first`` on are kept. seed: int64 (1,), on any device."""
    counters = torch.arange((columns + 3) // 4, device=seed.device)
    row = torch.arange(first, first + rows, device=seed.device)[:, None]
    words = torch.stack(torch.broadcast_tensors(*philox(seed, counters[None, :], row)), dim=2)
    return (words.flatten(1)[:, :columns] >> 1) >= threshold(p)


def philox(seed: Tensor, c0: Tensor, c1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words for the counters (c0, c1, 0, 0), in int64."""
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    c2 = c3 = torch.zeros_like(seed)
    for _ in range(_ROUNDS):
        # The products wrap around in int64; their 32-bit halves are right all the same.
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((high >> 32) & _WORD) ^ c1 ^ k0, high & _WORD, ((low >> 32) & _WORD) ^ c3 ^ k1, low & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def drop(x: Tensor, p: float, seed: Tensor, first: int = 0) -> Tensor:
    """x (n, d), the rows from ``first`` on, with zeros where elements are dropped; what is kept is not scaled."""
    rows, columns = x.shape
    height = max(1, _BLOCK // max(columns, 1))
    parts = [
        torch.where(keep(seed, p, first + start, min(height, rows - start), columns), x[start : start + height], 0)
        for start in range(0, rows, height)
    ]
    return torch.cat(parts) if parts else x
