"""Small wheels of the kernels' Python files, made without building."""

from __future__ import annotations

import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def make_wheel(folder: Path, tag: str = "py3-none-any", version: str = "0.1.0", **extra: bytes) -> Path:
    """A wheel of kore_kernels; ``extra``: further contents by path."""
    path = folder / f"kore_lmm-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("kore_kernels/", b"")
        for source in sorted((ROOT / "kore_kernels").rglob("*.py")):
            archive.write(source, source.relative_to(ROOT).as_posix())
        archive.writestr(f"kore_lmm-{version}.dist-info/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}\n")
        for name, content in extra.items():
            archive.writestr(name, content)
    return path
