"""The ``kore`` command line. Nothing heavy is imported until a command needs it."""

from kore.cli.main import main

__all__ = ["main"]
