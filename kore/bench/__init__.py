"""Measures KORE's kernels beside what they replace, on the user's own machine.

``timing`` times contenders in turn, ``machine`` measures what the hardware can do, ``peers`` holds the other ways to
add up a covariance, ``covariance`` and ``capture`` check and time one update and one pass over a model, ``show`` makes
the table and the picture. ``kore bench`` and the suites in ``benchmarks/`` are built from these.
"""
