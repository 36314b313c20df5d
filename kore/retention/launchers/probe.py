"""What an environment has, without importing any of it: modules, a distribution's version, lmms-eval's tasks.

Run as a file by that environment's interpreter, ``python probe.py QUESTION``, which needs nothing of ours.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

MARK = "kore-probe: "


def main(arguments: Sequence[str]) -> None:
    """Print one line with the answer to the question in the only argument, both JSON."""
    asked = json.loads(arguments[0])
    answer: dict[str, Any] = {
        "missing": [name for name in asked["modules"] if not _found(name)],
        "version": _version(asked["distribution"]),
        "tasks": {},
    }
    if asked.get("tasks"):
        folders = [Path(one) for one in asked.get("include", [])]
        spec = importlib.util.find_spec("lmms_eval")
        if spec is not None:
            folders += [Path(one) / "tasks" for one in spec.submodule_search_locations or []]
        answer["tasks"] = _tasks(asked["tasks"], folders)
    print(MARK + json.dumps(answer))


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tasks(names: Iterable[str], folders: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Data set, configuration and split of each task that is there."""
    found: dict[str, dict[str, Any]] = {}
    pattern = re.compile(r"^task\s*:\s*['\"]?([\w.-]+)['\"]?\s*(?:#.*)?$", re.MULTILINE)
    wanted = set(names)
    for folder in folders:
        for file in sorted(folder.rglob("*.yaml")):
            name = pattern.search(file.read_text(encoding="utf-8", errors="replace"))
            if name is None or name[1] not in wanted or name[1] in found:
                continue
            settings = _settings(file)
            found[name[1]] = {
                "data": settings.get("dataset_path"),
                "config": settings.get("dataset_name"),
                "split": settings.get("test_split") or settings.get("validation_split"),
            }
    return found


def _settings(file: Path, depth: int = 0) -> dict[str, Any]:
    """A task's file with those it includes; ``!function utils.x`` is read as nothing."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    values = yaml.load(file.read_text(encoding="utf-8", errors="replace"), Loader) or {}
    included = values.get("include")
    names = [included] if isinstance(included, str) else included or []
    merged: dict[str, Any] = {}
    for name in names:
        other = file.parent / name
        if other.is_file() and depth < 8:
            merged |= _settings(other, depth + 1)
    return merged | values


if __name__ == "__main__":
    del sys.path[0]
    main(sys.argv[1:])
