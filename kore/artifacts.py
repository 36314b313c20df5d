"""The only path by which KORE saves and loads its artifacts.

An artifact is a directory of safetensors and text files with a ``manifest.json`` that is written last and
carries the size and sha256 of every other file. Directories appear atomically: they are written to a
temporary sibling, flushed to disk and renamed, so a kill at any moment leaves the old artifact or the new one.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kore import __version__
from kore.errors import ArtifactError

if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
_TEMPORARY = re.compile(r"(\d+)(?:-[0-9a-f]{8})?")


def file_sha256(path: str | os.PathLike[str]) -> str:
    """sha256 of a file's bytes, as hexadecimal text."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def remove_abandoned(path: Path) -> None:
    """Delete the temporary siblings of ``path`` whose process is gone."""
    prefix = f".{path.name}.tmp-"
    for sibling in path.parent.glob(f"{glob.escape(prefix)}*"):
        found = _TEMPORARY.fullmatch(sibling.name.removeprefix(prefix))
        if found and not _alive(int(found[1])):
            shutil.rmtree(sibling, ignore_errors=True) if sibling.is_dir() else sibling.unlink(missing_ok=True)


def _exchange(new: Path, old: Path) -> bool:
    """Swap two paths in one step (Linux ``renameat2``). False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    at_fdcwd, exchange = -100, 2
    return rename(at_fdcwd, os.fsencode(new), at_fdcwd, os.fsencode(old), exchange) == 0


def _replace_directory(new: Path, path: Path) -> None:
    if not path.exists():
        new.rename(path)
    elif _exchange(new, path):
        shutil.rmtree(new)
    else:
        old = path.with_name(f".{path.name}.tmp-{os.getpid()}-old")
        path.rename(old)
        new.rename(path)
        shutil.rmtree(old)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a directory that appears at ``path`` whole or not at all, replacing what stood there.

    Yields a temporary sibling directory to write into. When the block ends, its files are flushed to disk and
    it is renamed to ``path``; when the block raises, it is removed and ``path`` is left as it was.
    """
    path = Path(path).absolute()
    if path.exists() and not path.is_dir():
        raise ArtifactError(f"{path}: expected a directory or nothing there, found a file; choose another output")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for entry in sorted(temporary.rglob("*")):
            _fsync(entry)
        _fsync(temporary)
        _replace_directory(temporary, path)
        _fsync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def atomic_write(path: str | os.PathLike[str], content: str | bytes | Iterable[str], durable: bool = True) -> None:
    """Write a file that appears at ``path`` whole or not at all, replacing what stood there.

    Content may come in pieces, so that a long file is never in memory as a whole.
    With ``durable=False`` that holds when the process is killed, but not when the machine loses power; this is several
    times faster, and enough for files whose content is checked when they are read.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Process ids are unique on one machine, not on all that share a file system.
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{os.urandom(4).hex()}")
    pieces: Iterable[str | bytes] = [content] if isinstance(content, str | bytes) else content
    try:
        with open(temporary, "wb") as file:
            for piece in pieces:
                file.write(piece.encode() if isinstance(piece, str) else piece)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            _fsync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: str | os.PathLike[str]) -> Any:
    """Parse a JSON file. Raises ArtifactError naming the file when it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read as JSON ({error})") from None


def write_manifest(
    directory: str | os.PathLike[str], kind: str, fields: Mapping[str, Any], files: Iterable[Path] | None = None
) -> None:
    """Write ``manifest.json``, the last file of an artifact.

    Args:
        directory: The artifact's directory, its other files already written.
        kind: What the artifact is, for example ``"covariance"``; checked when it is read.
        fields: JSON-serialisable content, kept as it is beside the library's own fields.
        files: The artifact's files, all of them below ``directory``; None: whatever is there.
    """
    directory = Path(directory)
    found = directory.rglob("*") if files is None else files
    names = sorted(
        (entry.relative_to(directory).as_posix() for entry in found if entry.is_file() and entry.name != MANIFEST),
        key=lambda name: name.split("/"),
    )
    about = {"schema_version": SCHEMA_VERSION, "library_version": __version__, "kind": kind, **fields}

    def pieces() -> Iterator[str]:
        """The JSON, one file after the other: there may be very many."""
        yield json.dumps(about, indent=2).removesuffix("\n}") + ',\n  "files": {'
        for number, name in enumerate(names):
            file = directory / name
            entry = json.dumps({"size": file.stat().st_size, "sha256": file_sha256(file)}, indent=2)
            indented = entry.replace("\n", "\n    ")
            yield f"{',' if number else ''}\n    {json.dumps(name)}: {indented}"
        yield "\n  }\n}\n" if names else "}\n}\n"

    atomic_write(directory / MANIFEST, pieces())


def read_manifest(directory: str | os.PathLike[str], kind: str, verify: bool = True) -> dict[str, Any]:
    """Read and check the manifest of an artifact.

    Args:
        directory: The artifact's directory.
        kind: The kind it must be.
        verify: Also compare the sha256 of every file, not only its presence and size.

    Raises:
        ArtifactError: The directory or a file is missing, truncated, corrupt, or the artifact is of another
            kind or of a newer schema; the message names the file.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ArtifactError(f"{directory}: no such {kind} directory")
    if not (directory / MANIFEST).is_file():
        raise ArtifactError(f"{directory}: not a {kind} artifact, it has no {MANIFEST}")
    manifest = read_json(directory / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        found = manifest.get("kind") if isinstance(manifest, dict) else type(manifest).__name__
        raise ArtifactError(f"{directory / MANIFEST}: expected an artifact of kind {kind!r}, found {found!r}")
    if manifest.get("schema_version", 0) > SCHEMA_VERSION:
        raise ArtifactError(
            f"{directory / MANIFEST}: schema version {manifest['schema_version']} is newer than this library's "
            f"{SCHEMA_VERSION}; update kore-lmm"
        )
    for name, expected in manifest.get("files", {}).items():
        file = directory / name
        if not file.is_file():
            raise ArtifactError(f"{file}: listed in the manifest but missing; make the {kind} again")
        if file.stat().st_size != expected["size"]:
            raise ArtifactError(
                f"{file}: truncated or changed, expected {expected['size']} bytes, found {file.stat().st_size}; "
                f"make the {kind} again"
            )
        if verify and file_sha256(file) != expected["sha256"]:
            raise ArtifactError(f"{file}: corrupt, its sha256 is not the manifest's; make the {kind} again")
    return manifest


def save_tensors(
    tensors: Mapping[str, torch.Tensor], path: str | os.PathLike[str], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors (any device, made contiguous) as one safetensors file."""
    from safetensors.torch import save_file

    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path, metadata)


def load_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read a safetensors file onto the CPU. Raises ArtifactError naming the file when it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: not a readable safetensors file ({error})") from None
