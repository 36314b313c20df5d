"""Covariances of layer inputs, C = Σ xᵀx, one matrix for each group of layers that read the same input."""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kore.artifacts import atomic_directory, file_sha256, load_tensors, read_manifest, save_tensors, write_manifest
from kore.errors import ArtifactError, KoreError
from kore.triangle import HALVES, Triangle, unpack

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

KIND = "covariance"
GRADIENTS = "output gradients"
BALANCED = "balanced"
_GROUPS = "groups"
_FULL = "covariance"  # the whole matrix, as files of schema version 1 hold it


@dataclass(frozen=True)
class Group:
    """Layers that read the same input, and therefore share one covariance.

    Attributes:
        name: The module of the group that ran first.
        modules: All modules of the group, in the order in which they ran.
        dim: d_in of the layers.
        tokens: Rows x that were accumulated; 0 until the capture ends.
    """

    name: str
    modules: tuple[str, ...]
    dim: int
    tokens: int = 0


class CovarianceSet:
    """The covariances of a model's layer inputs. ``cov[module]`` is the symmetric (d_in, d_in) matrix of a module.

    A set that was loaded from disk, or merged from such sets, reads a matrix when it is asked for and does not
    keep it, so a set larger than memory can be used group by group. A captured set holds half of each matrix and
    makes the other half when it is asked for.

    Args:
        matrices: For every group name its matrix, a triangle of it, or a function that returns it.
        groups: The groups, in the order in which they ran.
        fingerprint: :func:`kore.models.model_fingerprint` of the base model.
        normalize: The row scaling of the capture, ``"none"`` or ``"official"``.
        selection: The ``tokens`` argument of the capture: which rows of the language model were counted.
        dtype: In which the sums were formed, ``"float32"`` or ``"float64"``; None where it is not known.
        merged_from: How :func:`merge_covariance` made the set, as JSON-serialisable values; None for a captured one.
    """

    kind: ClassVar[str] = KIND

    def __init__(
        self,
        matrices: Mapping[str, torch.Tensor | Triangle | Callable[[], torch.Tensor]],
        groups: Iterable[Group],
        fingerprint: Mapping[str, str | None],
        normalize: str = "none",
        selection: str = "all",
        dtype: str | None = None,
        merged_from: Mapping[str, Any] | None = None,
    ) -> None:
        self.groups: tuple[Group, ...] = tuple(groups)
        self.fingerprint = dict(fingerprint)
        self.normalize, self.selection, self.dtype = normalize, selection, dtype
        self.merged_from = None if merged_from is None else dict(merged_from)
        self._matrices = dict(matrices)
        self._group_of = {module: group for group in self.groups for module in group.modules}

    @property
    def modules(self) -> tuple[str, ...]:
        """Every module that has a covariance."""
        return tuple(self._group_of)

    def __contains__(self, module: object) -> bool:
        return module in self._group_of

    def __len__(self) -> int:
        return len(self._group_of)

    def __repr__(self) -> str:
        tokens = max((group.tokens for group in self.groups), default=0)
        return f"CovarianceSet({len(self)} modules in {len(self.groups)} groups, up to {tokens} tokens)"

    def group(self, module: str) -> Group:
        """The group of a module. Raises KoreError where the set does not hold the module."""
        try:
            return self._group_of[module]
        except KeyError:
            near = ", ".join(difflib.get_close_matches(module, self._group_of, n=3)) or ", ".join(self.modules[:3])
            raise KoreError(
                f"no covariance for module {module!r}; near: {near}. Capture it by naming it in targets"
            ) from None

    def tokens(self, module: str) -> int:
        """How many input rows the covariance of a module sums over."""
        return self.group(module).tokens

    def __getitem__(self, module: str) -> torch.Tensor:
        """The symmetric (d_in, d_in) covariance of a module."""
        matrix = self._matrices[self.group(module).name]
        if isinstance(matrix, Triangle):
            return matrix.full()
        return matrix() if callable(matrix) else matrix

    def origin(self) -> dict[str, Any]:
        """Where the matrices come from, as JSON-serialisable values: what was counted, how, and how it was merged."""
        return {
            "tokens": max((group.tokens for group in self.groups), default=0),
            "selection": self.selection,
            "normalize": self.normalize,
            "dtype": self.dtype,
            "merged_from": self.merged_from,
        }

    def digest(self, module: str) -> str:
        """Tells the matrix of a module from others: the sha256 of its file, or else of its entries."""
        matrix = self._matrices[self.group(module).name]
        if isinstance(matrix, _Reader):
            return matrix.sha256
        entries = self[module].detach().cpu().contiguous()
        return hashlib.sha256(entries.numpy().data).hexdigest()

    def save(self, path: str | os.PathLike[str], *, keep_groups: bool = False) -> None:
        """Write the set as a directory: half of each matrix in a safetensors file, and a manifest. Atomic.

        Args:
            path: The directory; one that is there is replaced.
            keep_groups: Keep what lies in its folder ``groups``, where :func:`group_folder` looks for the sets that
                this one was merged from.
        """
        with atomic_directory(path) as directory:
            fields = {
                "groups": write_groups(directory, ((group, self._triangle(group.name)) for group in self.groups)),
                "normalize": self.normalize,
                "selection": self.selection,
                "dtype": self.dtype,
                "merged_from": self.merged_from,
                "fingerprint": self.fingerprint,
            }
            write_manifest(directory, self.kind, fields)
            if keep_groups and (Path(path) / _GROUPS).is_dir():
                shutil.copytree(Path(path) / _GROUPS, directory / _GROUPS, copy_function=_link)

    def _triangle(self, name: str) -> Triangle:
        matrix = self._matrices[name]
        return matrix if isinstance(matrix, Triangle) else Triangle(self[name])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Open a saved set of this kind; see :func:`load_covariance`."""
        directory = Path(path)
        manifest = read_manifest(directory, cls.kind, verify=False)
        groups, matrices = read_groups(directory, manifest)
        return cls(
            matrices,
            groups,
            manifest.get("fingerprint", {}),
            manifest.get("normalize", "none"),
            manifest.get("selection", "all"),
            manifest.get("dtype"),
            manifest.get("merged_from"),
        )


class OutputGradients(CovarianceSet):
    """G = Σ gᵀg (d_out, d_out) of every module, g being the gradients at its output on old data.

    Used like a :class:`CovarianceSet`; each module is a group of its own, whose ``dim`` is d_out and whose ``tokens``
    counts the rows g. ``selection`` says at which tokens the loss was taken.
    """

    kind: ClassVar[str] = GRADIENTS


def group_folder(path: Path, number: int) -> Path:
    """Where a balanced capture saved at ``path`` keeps the set of one group of old data, by its place in
    ``merged_from``."""
    return path / _GROUPS / f"{number:03d}"


def _link(source: str, target: str) -> None:
    """A second name for the file where the file system has such, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def write_groups(directory: Path, matrices: Iterable[tuple[Group, Triangle]]) -> list[dict[str, Any]]:
    """Write one file per group into ``directory`` and return the manifest entries that :func:`read_groups` reads."""
    entries = []
    for index, (group, triangle) in enumerate(matrices):
        file = f"group-{index:05d}.safetensors"
        save_tensors({triangle.half: triangle.packed()}, directory / file)
        entries.append({**asdict(group), "file": file})
    return entries


def read_groups(
    directory: Path, manifest: Mapping[str, Any]
) -> tuple[list[Group], dict[str, Callable[[], torch.Tensor]]]:
    """The groups of a manifest and, by group name, functions that check and read their matrices."""
    try:
        groups = [
            Group(entry["name"], tuple(entry["modules"]), int(entry["dim"]), int(entry["tokens"]))
            for entry in manifest["groups"]
        ]
        files = {entry["name"]: (entry["file"], manifest["files"][entry["file"]]) for entry in manifest["groups"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{directory}: the manifest does not describe its groups ({error!r})") from None
    return groups, {
        group.name: _Reader(directory / files[group.name][0], files[group.name][1]["sha256"], group.dim)
        for group in groups
    }


class _Reader:
    """Reads a matrix file when called. Its sha256 is checked the first time."""

    def __init__(self, file: Path, sha256: str, dim: int) -> None:
        self.file, self.sha256, self.dim = file, sha256, dim
        self._verified = False

    def __call__(self) -> torch.Tensor:
        if not self._verified:
            if not self.file.is_file():
                raise ArtifactError(f"{self.file}: no such file; capture the covariance again")
            if file_sha256(self.file) != self.sha256:
                raise ArtifactError(f"{self.file}: corrupt, its sha256 is not the manifest's; capture it again")
            self._verified = True
        tensors = load_tensors(self.file)
        entries = self.dim * (self.dim + 1) // 2
        for half in HALVES:
            if half in tensors and tensors[half].shape == (entries,):
                return unpack(tensors[half], self.dim, half)
        if _FULL in tensors and tensors[_FULL].shape == (self.dim, self.dim):
            return tensors[_FULL]
        found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()) or "nothing"
        raise ArtifactError(
            f"{self.file}: expected a lower or upper triangle of {entries} entries for d_in {self.dim}, found {found}"
        )


def load_covariance(path: str | os.PathLike[str]) -> CovarianceSet:
    """Open a saved :class:`CovarianceSet`.

    Presence and size of every file are checked now, the sha256 of a group's file when the group is first read.

    Raises:
        ArtifactError: A file is missing, truncated or corrupt; the message names it.
    """
    return CovarianceSet.load(path)


def load_output_gradients(path: str | os.PathLike[str]) -> OutputGradients:
    """Open saved :class:`OutputGradients`, as :func:`load_covariance` opens a covariance."""
    return OutputGradients.load(path)


def merge_covariance(
    sets: Sequence[CovarianceSet] | Mapping[str, CovarianceSet], weights: Sequence[float] | str | None = None
) -> CovarianceSet:
    """The weighted sum Σ_k w_k C_k of covariance sets.

    With weights None the result is what one run over all the data would have captured. ``"balanced"`` gives every
    set the same say, however many tokens it has and however large its inputs are: for each matrix by itself
    w_k = T / (n · tr C_k), where T = Σ_k tr C_k and n counts the sets whose C_k is not 0. So each of those n
    contributes the trace T / n, and the trace of the result is that of the plain sum. The eigenvectors are those of
    Σ_k C_k / tr C_k.

    Args:
        sets: Sets of the same model and the same modules, by name or without names.
        weights: One finite weight ≥ 0 for each set, not all 0; None for 1 each; or ``"balanced"``. Token counts are
            added unweighted, over the sets whose weight is not 0.

    Returns:
        A set that computes a sum when it is asked for a matrix; the ``sets`` are not changed. Its ``merged_from``
        (also in its manifest) holds the weights, and of each set its name, its largest token count and, where it was
        merged itself, its ``merged_from``.

    Raises:
        KoreError: The sets differ in model, modules, grouping, row scaling, selected tokens or dtype, or a weight
            is wrong.
    """
    names = list(sets) if isinstance(sets, Mapping) else [None] * len(sets)
    sets = list(sets.values()) if isinstance(sets, Mapping) else list(sets)
    if not sets:
        raise KoreError("merge_covariance: expected at least one covariance set, got none")
    balanced = isinstance(weights, str) and weights == BALANCED
    factors = [1.0] * len(sets) if balanced or weights is None else _factors(weights, len(sets))
    first = sets[0]
    for index, other in enumerate(sets[1:], start=1):
        _check_same(first, other, index)
    kept = [(cov, factor) for cov, factor in zip(sets, factors) if factor]
    groups = [replace(group, tokens=sum(cov.tokens(group.name) for cov, _ in kept)) for group in first.groups]
    matrices = {group.name: _Sum(group.name, kept, balanced) for group in groups}
    merged_from = {
        "weights": BALANCED if balanced else factors,
        "sets": [
            {
                "name": name,
                "tokens": max((group.tokens for group in cov.groups), default=0),
                **({} if cov.merged_from is None else {"merged_from": cov.merged_from}),
            }
            for name, cov in zip(names, sets)
        ],
    }
    return type(first)(matrices, groups, first.fingerprint, first.normalize, first.selection, first.dtype, merged_from)


def _factors(weights: Sequence[float] | str, count: int) -> list[float]:
    if isinstance(weights, str):
        raise KoreError(f"merge_covariance: expected numbers, None or {BALANCED!r} as weights, got {weights!r}")
    factors = [float(weight) for weight in weights]
    if len(factors) != count:
        raise KoreError(f"merge_covariance: expected {count} weights, one for each set, got {len(factors)}")
    if any(not math.isfinite(w) or w < 0 for w in factors) or not any(factors):
        raise KoreError(f"merge_covariance: expected finite weights ≥ 0 that are not all 0, got {factors}")
    return factors


class _Sum:
    """Computes one merged matrix when called; reads each part once and keeps none."""

    def __init__(self, module: str, parts: list[tuple[CovarianceSet, float]], balanced: bool) -> None:
        self.module, self.parts, self.balanced = module, parts, balanced

    def __call__(self) -> torch.Tensor:
        import torch

        total: torch.Tensor | None = None
        traces = []
        for cov, factor in self.parts:
            part = cov[self.module]
            if self.balanced:
                trace = float(part.diagonal().double().sum())
                if trace == 0:
                    total = torch.zeros_like(part) if total is None else total
                    continue
                traces.append(trace)
                factor = 1 / trace
            if total is None:
                total = part * factor
            else:
                part = part.to(total.device)
                total = total.to(torch.promote_types(total.dtype, part.dtype)).add_(part, alpha=factor)
        assert total is not None
        return total.mul_(sum(traces) / len(traces)) if traces else total


def _check_same(first: CovarianceSet, other: CovarianceSet, index: int) -> None:
    if first.kind != other.kind:
        raise KoreError(f"merge_covariance: set 0 holds {first.kind}, set {index} {other.kind}; merge them apart")
    for field in ("architecture", "structure", "weights"):
        a, b = first.fingerprint.get(field), other.fingerprint.get(field)
        if a and b and a != b:
            raise KoreError(f"merge_covariance: set {index} was captured on another model than set 0 ({field} differs)")
    for option, a, b in (
        ("normalize", first.normalize, other.normalize),
        ("tokens", first.selection, other.selection),
        ("dtype", first.dtype, other.dtype),
    ):
        if a and b and a != b:
            raise KoreError(
                f"merge_covariance: set 0 was captured with {option}={a!r}, set {index} with {b!r}; capture them alike"
            )
    if set(first.modules) != set(other.modules):
        odd = sorted(set(first.modules) ^ set(other.modules))
        raise KoreError(f"merge_covariance: set {index} holds other modules than set 0, for example {odd[0]}")
    if {frozenset(g.modules) for g in first.groups} != {frozenset(g.modules) for g in other.groups}:
        raise KoreError(
            f"merge_covariance: set {index} groups the modules in another way than set 0; "
            "capture both with the same share_inputs"
        )
