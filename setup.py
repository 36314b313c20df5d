"""Build script. All metadata is in pyproject.toml; nothing here imports torch."""

from setuptools import setup

setup()
