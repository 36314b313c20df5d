"""Benchmarks and the static kernel audit; none of it is installed with the packages."""
