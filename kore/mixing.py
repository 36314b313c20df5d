"""Which covariance an adapter is made from: a file, some groups of a balanced capture, or a weighted mixture."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from kore.covariance import BALANCED, CovarianceSet, group_folder, load_covariance, merge_covariance
from kore.errors import ArtifactError, ConfigError

Weights = Mapping[str, float] | Sequence[float] | str | None


def open_mixture(paths: Sequence[Path], groups: Sequence[str] | None = None, weights: Weights = None) -> CovarianceSet:
    """The covariance Σ w_k C_k of saved ones. Its matrices are read when they are asked for.

    Args:
        paths: Results of ``kore capture``.
        groups: Names of groups of old data that one capture has balanced; only theirs are taken, for example those of
            one benchmark.
        weights: w_k by group, or in the order of ``groups`` or ``paths``; ``"balanced"``, the default where there are
            several, as in :func:`kore.merge_covariance`.

    Returns:
        The set of a single path as it is. Otherwise a sum, whose ``merged_from`` names its parts: the groups, or the
        shortest ends of the paths that tell them apart.

    Raises:
        ConfigError: There is no such group, or the weights do not fit.
        KoreError: The sets cannot be added up, see :func:`kore.merge_covariance`.
    """
    found = sources(paths, groups)
    checked = check_weights(list(found), weights)
    if groups is None and len(found) == 1:
        return load_covariance(paths[0])
    return merge_covariance({name: load_covariance(path) for name, path in found.items()}, checked)


def sources(paths: Sequence[Path], groups: Sequence[str] | None) -> dict[str, Path]:
    """The folders that are read, by the names of what they hold.

    Raises:
        ConfigError: There is no such group.
        ArtifactError: The group is not kept.
    """
    if groups is None:
        return dict(zip(_short_names(paths), paths, strict=True))
    if len(paths) != 1:
        raise ConfigError(f"groups: expected one covariance whose groups they are, got {len(paths)}")
    known = group_names(load_covariance(paths[0]))
    found = {}
    for group in groups:
        if group not in known:
            raise ConfigError(f"groups: {unknown_group(group, known)}" if known else f"groups: {_ungrouped(paths[0])}")
        found[group] = group_folder(paths[0], known.index(group))
        if not found[group].is_dir():
            raise ArtifactError(f"{found[group]}: group {group!r} is not kept; capture again, with capture.keep_groups")
    return found


def group_names(covariance: CovarianceSet) -> list[str]:
    """The groups of old data that a capture has balanced; none where it made one sum."""
    merged = covariance.merged_from or {}
    return [str(part["name"]) for part in merged.get("sets", []) if part["name"]]


def unknown_group(group: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(group, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"the old data has no group {group!r}, it has {', '.join(known)}{hint}"


def _ungrouped(path: Path) -> str:
    return f"{path} is one sum, not captured group by group; capture several files or groups, and let old.balance be"


def check_weights(names: Sequence[str], weights: Weights) -> list[float] | str:
    """One weight ≥ 0 for each name, or ``"balanced"``. Raises ConfigError where they do not fit."""
    if weights is None:
        return BALANCED if len(names) > 1 else [1.0]
    if len(names) == 1:
        raise ConfigError("weights: expected several covariances or groups to weigh, got one")
    if isinstance(weights, str):
        if weights != BALANCED:
            raise ConfigError(
                f"weights: expected {BALANCED} or a number for each of {', '.join(names)}, got {weights!r}"
            )
        return weights
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            odd = sorted(set(weights) ^ set(names))
            what = "has no weight" if odd[0] in names else f"is not one of {', '.join(names)}"
            raise ConfigError(f"weights: {odd[0]!r} {what}")
        weights = [weights[name] for name in names]
    if len(weights) != len(names):
        raise ConfigError(f"weights: expected {len(names)}, one for each of {', '.join(names)}, got {len(weights)}")
    if any(not math.isfinite(w) or w < 0 for w in weights) or not any(weights):
        raise ConfigError(f"weights: expected numbers ≥ 0 that are not all 0, got {list(weights)}")
    return [float(weight) for weight in weights]


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.absolute().parts for path in paths]
    if len(set(parts)) < len(parts):
        twice = next(path for path in paths if parts.count(path.absolute().parts) > 1)
        raise ConfigError(f"covariance: {twice} is given twice; give it a larger weight instead")
    length = 1
    while len({part[-length:] for part in parts}) < len(parts):
        length += 1
    return ["/".join(part[-length:]) for part in parts]
