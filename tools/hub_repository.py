"""A repository for the Hugging Face ``kernels`` package, made from wheels: hub_repository.py WHEEL... -o FOLDER

    kernels.get_local_kernel(Path("FOLDER")).covariance_update_(C, x)

A pure wheel becomes the variants without an architecture, compiled ones the variants of theirs; wheels for several
Pythons share a folder, in which each Python finds its own module. The compiled code knows nothing of torch: the
variants' "stable ABI 2.6" is no more than the oldest torch that the Python code works with.

That package imports a folder under a name of its own, so imports become relative and operations get a namespace of
their own: both copies, this one and an installed one, may be loaded in one process.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import zipfile
from pathlib import Path

NAME, VERSION, OLDEST_TORCH = "kore-kernels", 1, "26"


def variants(wheel: Path) -> dict[str, str]:
    """{variant: backend} of a wheel, by its file name."""
    version, _, _, platform = wheel.name.removesuffix(".whl").split("-")[1:]
    if platform == "any":
        return {"torch-cpu": "cpu", "torch-cuda": "cuda"}
    machine = re.search(r"linux_(?:\d+_\d+_)?(x86_64|aarch64)", platform)
    if machine is None:
        raise SystemExit(f"{wheel.name}: expected a pure wheel or one for Linux, got platform {platform}")
    toolkit = re.search(r"\+(cu\d+)$", version)
    names = {toolkit[1]: "cuda"} if toolkit else {"cpu": "cpu"}
    return {f"torch-stable-abi{OLDEST_TORCH}-{name}-{machine[1]}-linux": kind for name, kind in names.items()}


def relative(source: str, name: str, namespace: str) -> str:
    """A module of the package (``name``: its path in the package) whose imports are relative."""
    dots = "." * name.count("/") + "."
    source = re.sub(r"(?m)^(\s*)from kore_kernels import ", rf"\1from {dots} import ", source)
    source = re.sub(r"(?m)^(\s*)from kore_kernels\.([\w.]+) import ", rf"\1from {dots}\2 import ", source)
    if re.search(r"(?m)^\s*import kore_kernels", source):
        raise SystemExit(f"kore_kernels/{name}: expected 'from kore_kernels import ...', got 'import kore_kernels'")
    return source.replace('"kore::', f'"{namespace}::').replace("torch.ops.kore.", f"torch.ops.{namespace}.")


def add(wheel: Path, build: Path) -> list[Path]:
    """Unpacks a wheel into each of its variants."""
    made = []
    with zipfile.ZipFile(wheel) as archive:
        ours = [name for name in archive.namelist() if name.startswith(("kore_kernels/", "kore_lmm.libs/"))]
        names = [name for name in ours if not name.endswith("/")]  # auditwheel names folders too
        for variant, backend in variants(wheel).items():
            folder = build / variant
            identity = f"kore_kernels_{variant}".replace("-", "_")
            for name in names:
                # A compiled module looks for its libraries in ../kore_lmm.libs.
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                content = archive.read(name)
                if name.endswith(".py"):
                    inside = name.removeprefix("kore_kernels/")
                    content = relative(content.decode(), inside, identity).encode()
                target.write_bytes(content)
            metadata = {
                "id": identity,
                "name": NAME,
                "version": VERSION,
                "license": "Apache-2.0",
                "python-depends": [],
                "backend": {"type": backend},
            }
            (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
            made.append(folder)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.output.exists() and any(arguments.output.iterdir()):
        raise SystemExit(f"{arguments.output} must be empty or new, and holds files; name another folder")
    for wheel in arguments.wheels:
        for folder in add(wheel, arguments.output / "build"):
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
            print(f"{folder}: {len(files)} files, {digest[:16]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
