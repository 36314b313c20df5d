"""What an adapter lets through, what covariances look like, and what a layer loses with its components.

``run`` takes every measure over a model, ``files`` and ``page`` write what it found; the measures are ``spectra``,
``similarity``, ``leaks``, ``retention``, ``rates`` and ``reconstruction``.
"""

from kore.analysis.adapters import Update, read_updates
from kore.analysis.files import write_analysis
from kore.analysis.leaks import leak, leak_and_energy_ratio
from kore.analysis.rates import MatchedRate, step_matched_rate
from kore.analysis.reconstruction import discard_errors
from kore.analysis.retention import Retention, measure_update
from kore.analysis.run import Analysis, analyze
from kore.analysis.similarity import frobenius_similarity, map_similarity
from kore.analysis.spectra import effective_rank, spectrum

__all__ = [
    "Analysis",
    "MatchedRate",
    "Retention",
    "Update",
    "analyze",
    "discard_errors",
    "effective_rank",
    "frobenius_similarity",
    "leak",
    "leak_and_energy_ratio",
    "map_similarity",
    "measure_update",
    "read_updates",
    "spectrum",
    "step_matched_rate",
    "write_analysis",
]
