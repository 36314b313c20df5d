"""Amounts of memory as people write them."""

from __future__ import annotations

import re

from kore.errors import KoreError

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}


def parse_bytes(size: int | str) -> int:
    """Bytes of a number, or of text such as ``"12GiB"``, ``"500 MB"``, ``"1.5g"`` (g and GiB are 2³⁰, GB is 10⁹).

    Raises KoreError for anything else, and for less than one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(size).strip().lower())
    count = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if count < 1:
        raise KoreError(f"expected a number of bytes or text like 12GiB or 500MB, got {size!r}")
    return count


def format_bytes(count: int) -> str:
    """Bytes in binary units: 512 B, 1.5 KiB, 22.0 GiB."""
    power = 0
    while power < len(_BINARY) - 1 and count >= 1024 ** (power + 1):
        power += 1
    return f"{count / 1024**power:.{1 if power else 0}f} {_BINARY[power]}"
