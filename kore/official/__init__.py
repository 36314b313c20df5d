"""Working with the official KORE code (KORE-LMM/KORE): its linear layer, and its checkpoints both ways."""

from kore.official.linear import CovSVDLinear

__all__ = ["CovSVDLinear"]
