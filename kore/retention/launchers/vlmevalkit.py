"""VLMEvalKit's ``run.py`` with a model class of ours: ``CHECKOUT OFFLINE ARGUMENT...``.

The checkout replaces Python's HTTPS context by one that checks nothing, loads its ``.env`` and imports every data set
it has; all of that stays in this process.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import runpy
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ABSENT = "torchvision"


def main(arguments: Sequence[str]) -> None:
    """Run ``CHECKOUT/run.py ARGUMENTS``; with OFFLINE "1" a data file that is there is used, never fetched anew."""
    checkout, offline, *rest = arguments
    sys.path.insert(0, checkout)
    _stand_in()
    import vlmeval.dataset
    import vlmeval.vlm

    from kore.retention.vlmeval_model import kore_class

    vlmeval.vlm.Kore = kore_class()
    if offline == "1":
        for one in vars(vlmeval.dataset).values():
            if isinstance(one, type) and getattr(one, "DATASET_MD5", None):
                one.DATASET_MD5 = {}  # type: ignore[attr-defined]
    sys.argv = [os.path.join(checkout, "run.py"), *rest]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _stand_in() -> None:
    """Let unrelated data sets import torchvision where it is not installed; using it there is an error.

    transformers is asked first, which otherwise would believe in it.
    """
    if importlib.util.find_spec(_ABSENT) is not None:
        return
    import transformers
    from transformers.utils import is_torchvision_available

    is_torchvision_available()
    for name in ("AutoProcessor", "AutoImageProcessor"):
        getattr(transformers, name)
    sys.meta_path.append(_Finder())


class _Finder:
    """Finds torchvision and everything below it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] != _ABSENT:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        return None


class _Absent(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(name, (), {})


class _Nothing(type):
    """A name that may be looked up and subclassed, with any attribute, but not called."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(name, (), {})

    def __call__(cls, *arguments: Any, **settings: Any) -> Any:
        raise ImportError(f"{cls.__name__}: torchvision is not installed in {Path(sys.prefix)}")
