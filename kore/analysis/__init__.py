"""What an adapter lets through, what a covariance looks like, and what a layer loses with its components."""

from kore.analysis.leaks import leak, leak_and_energy_ratio
from kore.analysis.spectra import spectrum

__all__ = ["leak", "leak_and_energy_ratio", "spectrum"]
