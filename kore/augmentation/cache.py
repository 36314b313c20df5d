"""A cache that is addressed by content: the same question finds the answer that it had.

An entry is one JSON file, ``<kind>/<first two digits>/<sha256 of the key>.json``, with the key, the value and the
value's sha256. Several threads and processes may use a folder at once.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kore.artifacts import atomic_write
from kore.errors import ConfigError

_KIND = re.compile(r"[a-z][a-z0-9_-]{0,63}")
# Temporary files are named after the process, so its threads take turns per name, whatever cache object they use.
_LOCKS = tuple(threading.Lock() for _ in range(64))


def canonical(value: Any) -> str:
    """JSON that is equal for equal values: sorted keys, no spaces, ASCII. Raises TypeError for what is not JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON, as hexadecimal text."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


class Cache:
    """Values by content, in a folder that is made when the first value is stored.

    Args:
        folder: Where the entries lie.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, kind: str, key: Mapping[str, Any]) -> Path:
        """The file of an entry, whether it is there or not."""
        if not _KIND.fullmatch(kind):
            raise ValueError(f"kind: expected lower-case letters, digits, - and _, got {kind!r}")
        name = digest(dict(key))
        return self.folder / kind / name[:2] / f"{name}.json"

    def get(self, kind: str, key: Mapping[str, Any]) -> Any | None:
        """The value stored for the key, or None where there is none or its file is corrupt."""
        return self._read(self.path(kind, key))

    def put(
        self, kind: str, key: Mapping[str, Any], value: Any, *, replace: bool = False, durable: bool = False
    ) -> Any:
        """Store a JSON value, unless the key has one already; return the one that is stored.

        Args:
            kind: The folder of the entry.
            key: What the value depends on.
            value: Is not None.
            replace: Whether it takes the place of one that is there.
            durable: Whether it is on the disk when this returns, which takes milliseconds: for what costs money. A
                process that is killed loses nothing either way.

        Raises:
            TypeError: Key or value is not JSON.
            ConfigError: The file cannot be written; the message names it.
        """
        path = self.path(kind, key)
        stated = canonical(value)
        sha256 = hashlib.sha256(stated.encode()).hexdigest()
        text = f'{{"key":{canonical(dict(key))},\n"sha256":"{sha256}",\n"value":{stated}}}\n'
        with _LOCKS[int(path.name[:2], 16) % len(_LOCKS)]:
            stored = None if replace else self._read(path)
            if stored is not None:
                return stored
            try:
                atomic_write(path, text, durable=durable)
            except OSError as error:
                raise ConfigError(
                    f"{path}: the cache cannot be written ({error.strerror or type(error).__name__}); "
                    "free some space or choose another folder"
                ) from error
        return json.loads(stated)

    @staticmethod
    def _read(path: Path) -> Any | None:
        try:
            content = json.loads(path.read_bytes())
            value, sha256 = content["value"], content["sha256"]
            return value if digest(value) == sha256 else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
