"""No number without a gate: how far a contender may be from float64 before it is timed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

PEER_TOLERANCE = 2e-2


class InaccurateError(RuntimeError):
    """A contender does not compute what it is timed for."""


def allowed_error(plain: float, n: int) -> float:
    """Twice the error of the plain expression in the same dtype, and a floor that grows with the length of a sum."""
    return 2 * plain + 2.0**-24 * max(n, 1) ** 0.5


def difference(found: Tensor, expected: Any) -> float:
    """‖found − expected‖ / ‖expected‖ in float64."""
    return float((found.double() - expected).norm() / expected.norm())


def check(name: str, where: str, error: float, limit: float) -> None:
    """Raise InaccurateError unless ``error`` is within ``limit``; a NaN is not."""
    if not error <= limit:
        raise InaccurateError(f"{name} at {where}: relative error {error:.2e}, allowed are {limit:.2e}")
