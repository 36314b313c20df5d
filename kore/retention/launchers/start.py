"""The file that an engine's interpreter runs: ``python start.py PARENT PACKAGES NAME [ARGUMENT...]``.

It makes this very ``kore`` importable there, whether or not a version of it is installed in that environment, without
putting anything else of ours on its path, and ends with the process that started it. NAME is a module beside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import json
import os
import signal
import sys
from typing import Any


class _Ours:
    """Finds packages by their folder."""

    def __init__(self, packages: dict[str, str]) -> None:
        self._packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        folder = self._packages.get(name)
        if folder is None:
            return None
        return importlib.util.spec_from_file_location(
            name, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
        )


def _end_with(parent: int) -> None:
    """Be told when the parent dies (Linux); elsewhere the child runs on to its end."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit("the process that started this has ended")


def main() -> None:
    parent, packages, name, *arguments = sys.argv[1:]
    _end_with(int(parent))
    del sys.path[0]  # this folder, whose modules are named after the engines
    sys.meta_path.insert(0, _Ours(json.loads(packages)))  # type: ignore[arg-type]
    importlib.import_module(f"kore.retention.launchers.{name}").main(arguments)


if __name__ == "__main__":
    main()
