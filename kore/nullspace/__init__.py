"""The directions old inputs use least: ``basis`` chooses a solver and measures what it found, ``solvers`` solves;
``geodesic`` goes from other directions to them."""

from kore.nullspace.basis import NullSpace, energy_ratio, energy_space, null_space
from kore.nullspace.geodesic import geodesic

__all__ = ["NullSpace", "energy_ratio", "energy_space", "geodesic", "null_space"]
