"""Errors a user can act on. The command line prints their one line and exits with status 2."""

from __future__ import annotations


class KoreError(ValueError):
    """Something the user gave is wrong: the message says what was expected, what came and what to do."""


class ConfigError(KoreError):
    """A configuration key or value is wrong."""


class DataError(KoreError):
    """A data file, row or image is wrong; the message names the file and line."""


class ArtifactError(KoreError):
    """A saved artifact is missing, corrupt, truncated or of another kind; the message names the file."""


class ModelError(KoreError):
    """A model cannot be loaded, or an artifact belongs to another model."""


class Unavailable(KoreError):
    """A service does not answer now, and may later: a time-out, an overloaded server, a broken connection.

    ``retry_after`` is how many seconds it asks to wait, or None.
    """

    retry_after: float | None = None
