"""The directions old inputs use least: ``basis`` chooses a solver and measures what it found, ``solvers`` solves."""

from kore.nullspace.basis import NullSpace, energy_ratio, null_space

__all__ = ["NullSpace", "energy_ratio", "null_space"]
