"""Subspaces between two others."""

from __future__ import annotations

import torch

from kore.errors import KoreError


def geodesic(start: torch.Tensor, end: torch.Tensor, t: float) -> torch.Tensor:
    """U(t) (d, r), orthonormal: the point at t of the shortest path of subspaces from span(start) to span(end).

    With the singular value decomposition startᵀ end = P cos(Θ) Qᵀ, Θ being the principal angles, y_i = end q_i and m_i
    the unit vector of (start p_i) − y_i cos θ_i, which end does not contain, the columns of U(t) are

        y_i cos((1 − t) θ_i) + m_i sin((1 − t) θ_i):

    each principal angle is gone through at a constant rate, so U(0) spans start and U(1) spans end (Edelman, Arias,
    Smith: The Geometry of Algorithms with Orthogonality Constraints, 1998, section 2.5.1). Where end is spanned by the
    eigenvectors of the r smallest eigenvalues of C, this makes

        tr(U(t)ᵀ C U(t)) = Σ cos²((1 − t) θ_i) y_iᵀ C y_i + sin²((1 − t) θ_i) m_iᵀ C m_i,

    which never grows with t, since m_iᵀ C m_i ≥ y_iᵀ C y_i.

    Args:
        start: (d, r) float64, orthonormal columns.
        end: The same, on the same device. Where it has directions at a right angle to all of start, several paths
            are shortest, and this is one of them.
        t: From 0 to 1.

    Peak memory beside the two: two matrices (d, r) and some (r, r).

    Raises:
        KoreError: The shapes differ, or t is not in 0..1.
    """
    if start.shape != end.shape or start.dim() != 2:
        raise KoreError(f"geodesic: expected two bases (d, r), got {tuple(start.shape)} and {tuple(end.shape)}")
    if not 0 <= t <= 1:
        raise KoreError(f"geodesic: expected t from 0 to 1, got {t}")
    P, cosine, Qt = torch.linalg.svd(start.mT @ end)
    y = end @ Qt.mT
    m = (start @ P).sub_(y * cosine)
    sine = torch.linalg.vector_norm(m, dim=0)
    # Not acos, which loses small angles. Where θ is 0, m is 0 and its factor may be anything finite.
    angle = (1 - t) * torch.atan2(sine, cosine)
    return y.mul_(angle.cos()).add_(m.mul_(angle.sin() / sine.clamp_min(torch.finfo(sine.dtype).tiny)))
