"""How much the covariances of several data sets look alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def map_similarity(maps: Sequence[np.ndarray]) -> np.ndarray:
    """Pearson correlation of every pair of heat maps over their cells; (n, n), 1 on the diagonal.

    Args:
        maps: As :func:`kore.report.figures.pooled` makes them, all of one shape.
    """
    rows = np.stack([np.asarray(cells, dtype=np.float64).ravel() for cells in maps])
    rows -= rows.mean(axis=1, keepdims=True)
    return _cosines(rows @ rows.T)


def frobenius_similarity(covariances: Sequence[torch.Tensor]) -> np.ndarray:
    """⟨C_a, C_b⟩ / (‖C_a‖_F ‖C_b‖_F) of every pair; (n, n) float64, in [0, 1] because covariances are positive.

    1 means equal up to a factor, 0 that no direction has energy in both.

    Args:
        covariances: Symmetric (d, d) matrices on one device.
    """
    n = len(covariances)
    inner = np.empty((n, n))
    for i, a in enumerate(covariances):
        for j in range(i + 1):
            inner[i, j] = inner[j, i] = float((a.double() * covariances[j].double()).sum())
    return _cosines(inner)


def _cosines(inner: np.ndarray) -> np.ndarray:
    """Inner products to cosines; a vector of zeros is like itself only."""
    norms = np.sqrt(np.diag(inner))
    cosines = inner / np.where(norms > 0, norms, 1)[:, None] / np.where(norms > 0, norms, 1)[None]
    np.fill_diagonal(cosines, 1)
    return cosines
