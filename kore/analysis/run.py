"""``kore analyze``: every measure over the layers of a model, one layer input at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kore.analysis.adapters import Update, read_updates
from kore.analysis.leaks import leak_and_energy_ratio, row_space
from kore.analysis.rates import MatchedRate, step_matched_rate
from kore.analysis.reconstruction import discard_errors, output_energy
from kore.analysis.retention import measure_update
from kore.analysis.similarity import frobenius_similarity, map_similarity
from kore.analysis.spectra import effective_rank, spectrum
from kore.covariance import CovarianceSet, Group, load_covariance
from kore.errors import KoreError, ModelError

_CURVE_POINTS = 33


@dataclass
class Analysis:
    """What :func:`analyze` measured.

    Attributes:
        data: For each data set its role (``"old"`` or ``"new"``) and what its covariance says of itself.
        inputs: For each shared input, named after its first module, and data set: tokens, trace, effective_rank.
        layers: For each module and data set, with an adapter: leak, energy_ratio, change and bound; with a model too
            change_ratio and bound_ratio, those over ‖W0 x‖.
        reconstruction: For each module, with a model: ``discarded``, and for each method and data set the errors.
        similarity: For each measure and shared input the matrix over data sets.
        spectra: For each data set and shared input the eigenvalues of C, descending.
        maps: For each shared input and data set the heat map.
        input_of: For each measured module the shared input that it reads.
        rank: Of the adapter's layers.
        rates: For each ``"new"`` data set the learning rate that :func:`kore.analysis.step_matched_rate` gives an
            adapter with a frozen A of KORE's.
    """

    data: dict[str, dict[str, Any]]
    inputs: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    layers: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    reconstruction: dict[str, dict[str, Any]] = field(default_factory=dict)
    similarity: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    spectra: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    maps: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    input_of: dict[str, str] = field(default_factory=dict)
    rank: dict[str, int] = field(default_factory=dict)
    rates: dict[str, MatchedRate] = field(default_factory=dict)

    def mean_similarity(self, measure: str) -> np.ndarray:
        """The mean of a similarity over all shared inputs."""
        return np.mean(list(self.similarity[measure].values()), axis=0)

    def to_json(self) -> dict[str, Any]:
        """All but spectra and maps, as JSON takes it."""
        similarity = {
            measure: {
                "mean": self.mean_similarity(measure).tolist(),
                "inputs": {name: matrix.tolist() for name, matrix in inputs.items()},
            }
            for measure, inputs in self.similarity.items()
        }
        return {
            "data": self.data,
            "inputs": self.inputs,
            "input_of": self.input_of,
            "layers": self.layers,
            "rank": self.rank,
            "rates": {name: asdict(rate) for name, rate in self.rates.items()},
            "similarity": similarity,
            "reconstruction": self.reconstruction,
        }


def analyze(
    old: Mapping[str, CovarianceSet | str | os.PathLike[str]],
    new: Mapping[str, CovarianceSet | str | os.PathLike[str]] | None = None,
    *,
    adapter: str | os.PathLike[str] | None = None,
    model: str | os.PathLike[str] | None = None,
    modules: str | None = None,
    device: str = "auto",
    progress: bool = True,
) -> Analysis:
    """Spectra, similarity, leak, energy ratio, retention and reconstruction of a model's layers.

    Layer inputs are taken one after the other; in memory is one matrix of each data set in float64, with some copies
    while it is decomposed, beside the weights where a model is given.

    Args:
        old: Covariances of old data by name. Reconstruction sees the first and is measured on all, old and new.
        new: Covariances of other data: held-out old data, or new knowledge. Of the same model.
        adapter: Directory of a LoRA adapter, for leak, energy ratio and retention.
        model: The base model, a directory or a hub id, for reconstruction and the ratios of retention.
        modules: Only layers whose whole name this regular expression matches.
        device: Where to compute: ``"auto"`` (the first CUDA device, else the CPU) or a torch device name.
        progress: Show a progress bar on an interactive terminal.

    Raises:
        KoreError: Two data sets have one name or are of different models, or no layer is left.
        ArtifactError: A covariance or the adapter cannot be read.
        ModelError: The model is not that of the covariances.
    """
    from tqdm import tqdm

    sets = _sets(old, new or {})
    updates = {} if adapter is None else read_updates(adapter)
    first = next(iter(sets.values()))
    chosen = _chosen(sets, modules)
    if adapter is not None and not updates.keys() & set(chosen):
        raise KoreError(f"the adapter {adapter} has none of the covariances' layers; expected one of the same model")
    weights = _Weights(model, first) if model is not None else None
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    found = Analysis({name: _describe(cov, "old" if name in old else "new") for name, cov in sets.items()})
    groups = [(group, [name for name in group.modules if name in chosen]) for group in first.groups]
    groups = [(group, members) for group, members in groups if members]
    for group, members in tqdm(groups, desc="layer inputs", disable=None if progress else True):
        matrices = {name: _matrix(name, cov, group, place) for name, cov in sets.items()}
        _measure_inputs(found, group.name, matrices, {name: cov.tokens(group.name) for name, cov in sets.items()})
        for module in members:
            found.input_of[module] = group.name
            weight = None if weights is None else weights[module].to(place, torch.float64)
            if module in updates:
                _measure_adapter(found, module, updates[module], weight, group.name, matrices)
            if weight is not None:
                _measure_reconstruction(found, module, weight, matrices)
    if adapter is not None and _is_frozen(adapter):
        measured = {module: updates[module] for module in chosen if module in updates}
        found.rates = {name: step_matched_rate(measured, sets[name]) for name in new or {}}
    return found


def _is_frozen(adapter: str | os.PathLike[str]) -> bool:
    """Whether KORE saved the adapter, with a frozen A."""
    from kore.adapter.files import KORE_FILE, read_info

    return (Path(adapter) / KORE_FILE).is_file() and bool(read_info(adapter)["a_frozen"])


def _sets(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, CovarianceSet]:
    if not old:
        raise KoreError("expected at least one covariance of old data, got none")
    if both := sorted(old.keys() & new.keys()):
        raise KoreError(f"two data sets are called {both[0]!r}; give each a name of its own")
    sets = {
        name: cov if isinstance(cov, CovarianceSet) else load_covariance(cov) for name, cov in {**old, **new}.items()
    }
    first_name, first = next(iter(sets.items()))
    for name, cov in sets.items():
        for key in ("architecture", "structure", "weights"):
            a, b = first.fingerprint.get(key), cov.fingerprint.get(key)
            if a and b and a != b:
                raise KoreError(f"{name} was captured on another model than {first_name} ({key} differs)")
    return sets


def _chosen(sets: Mapping[str, CovarianceSet], modules: str | None) -> list[str]:
    covs = list(sets.values())
    shared = [name for name in covs[0].modules if all(name in cov for cov in covs)]
    if not shared:
        raise KoreError("the data sets have no layer in common; capture them with the same targets")
    if modules is None:
        return shared
    try:
        chosen = [name for name in shared if re.fullmatch(modules, name)]
    except re.error as error:
        raise KoreError(f"modules: {modules!r} is not a regular expression ({error})") from None
    if not chosen:
        raise KoreError(f"modules: {modules!r} matches none of the {len(shared)} layers, for example {shared[0]}")
    return chosen


def _describe(cov: CovarianceSet, role: str) -> dict[str, Any]:
    tokens = max((group.tokens for group in cov.groups), default=0)
    return {
        "role": role,
        "tokens": tokens,
        "modules": len(cov),
        "inputs": len(cov.groups),
        "normalize": cov.normalize,
        "selection": cov.selection,
        "dtype": cov.dtype,
    }


def _matrix(name: str, cov: CovarianceSet, group: Group, device: torch.device) -> torch.Tensor:
    C = cov[next(module for module in group.modules if module in cov)].to(device, torch.float64)
    if C.shape[0] != group.dim:
        raise KoreError(f"{name}: {group.name} has d_in = {C.shape[0]}, in the first data set {group.dim}")
    if not bool(torch.isfinite(C).all()):
        raise KoreError(f"{name}: the covariance of {group.name} holds NaN or infinity; capture it again")
    return C


def _measure_inputs(
    found: Analysis, group: str, matrices: Mapping[str, torch.Tensor], tokens: Mapping[str, int]
) -> None:
    from kore.report.figures import pooled

    for name, C in matrices.items():
        eigenvalues = spectrum(C)
        found.spectra.setdefault(name, {})[group] = eigenvalues.cpu()
        found.maps.setdefault(group, {})[name] = pooled(C.cpu().numpy())
        found.inputs.setdefault(group, {})[name] = {
            "tokens": tokens[name],
            "trace": float(C.diagonal().sum()),
            "effective_rank": effective_rank(eigenvalues),
        }
    found.similarity.setdefault("maps", {})[group] = map_similarity(list(found.maps[group].values()))
    found.similarity.setdefault("frobenius", {})[group] = frobenius_similarity(list(matrices.values()))


def _measure_adapter(
    found: Analysis,
    module: str,
    update: Update,
    weight: torch.Tensor | None,
    group: str,
    matrices: Mapping[str, torch.Tensor],
) -> None:
    for name, C in matrices.items():
        U = row_space(module, update.A, C)
        found.rank[module] = U.shape[1]
        value, ratio = leak_and_energy_ratio(U, C, found.spectra[name][group])
        kept = asdict(measure_update(update, C))
        if weight is not None:
            output = output_energy(weight, C) ** 0.5
            kept |= {f"{key}_ratio": amount / output if output else 0.0 for key, amount in kept.items()}
        found.layers.setdefault(module, {})[name] = {"leak": value, "energy_ratio": ratio, **kept}


def _measure_reconstruction(
    found: Analysis, module: str, weight: torch.Tensor, matrices: Mapping[str, torch.Tensor]
) -> None:
    seen = next(iter(matrices.values()))
    errors = discard_errors(weight, seen, matrices)
    points = np.unique(np.linspace(0, min(weight.shape), _CURVE_POINTS).round().astype(int)).tolist()
    found.reconstruction[module] = {
        "discarded": points,
        "errors": {
            method: {name: curve[points].tolist() for name, curve in curves.items()}
            for method, curves in errors.items()
        },
    }


class _Weights:
    """W0 (d_out, d_in) of the layers of a model that the covariances belong to."""

    def __init__(self, model: str | os.PathLike[str], cov: CovarianceSet) -> None:
        from kore.models import check_fingerprint, load_model, named_linears

        loaded = load_model(model, device="cpu")
        check_fingerprint(cov.fingerprint, loaded, "the covariance")
        self._linears = named_linears(loaded)

    def __getitem__(self, module: str) -> torch.Tensor:
        from kore.adapter.factors import read_weight

        if module not in self._linears:
            raise ModelError(f"the model has no linear layer {module}; expected the one that was captured")
        return read_weight(module, self._linears[module])
