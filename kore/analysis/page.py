"""The page of ``kore analyze``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kore.analysis.reconstruction import METHODS
from kore.report import Report
from kore.report.figures import module_kind

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kore.analysis.run import Analysis

_MAP_ROWS = 4
_SHARES = (0.125, 0.25, 0.5, 0.75)


def build_page(found: Analysis, settings: Mapping[str, Any]) -> tuple[Report, dict[str, Figure]]:
    """The report, and its figures by name."""
    report = Report("Analysis of layer inputs", ", ".join(found.data))
    drawn: dict[str, Figure] = {}

    def show(name: str, figure: Figure, caption: str) -> None:
        drawn[name] = figure
        report.figure(figure, caption)

    columns = ["data", "role", "tokens", "layers", "inputs", "scaling", "tokens counted", "sums"]
    keys = ("role", "tokens", "modules", "inputs", "normalize", "selection", "dtype")
    report.table(columns, [[name, *(entry[key] for key in keys)] for name, entry in found.data.items()])
    _similarity(found, report, show)
    _spectra(found, report, show)
    if found.layers:
        _leak(found, report, show)
        _retention(found, report, show)
    if found.rates:
        _rates(found, report)
    if found.reconstruction:
        _reconstruction(found, report, show)
    report.section("Settings").facts({key: _text(value) for key, value in settings.items()})
    return report, drawn


def _similarity(found: Analysis, report: Report, show: Callable[[str, Figure, str], None]) -> None:
    from kore.report import figures

    report.section(
        "Data sets side by side",
        "C = Σ xᵀx of a layer's inputs. A heat map is C over 32 × 32 nearly equal blocks, the mean of |entries| of "
        "each, relative to its largest cell.\n\nMaps: the Pearson correlation of two heat maps over their cells. "
        "Frobenius: ⟨C_a, C_b⟩ / (‖C_a‖ ‖C_b‖) of the whole matrices. Both are 1 for equal data and are averaged over "
        "all layer inputs; related tasks have similar covariances.",
    )
    rows = {group: found.maps[group] for group in _representatives(list(found.maps))}
    show("heat-maps", figures.heat_map_table(rows), "|C| of some layer inputs, from the middle of the model.")
    if len(found.data) > 1:
        matrices = {measure.capitalize(): found.mean_similarity(measure) for measure in found.similarity}
        count = len(found.inputs)
        show(
            "similarity",
            figures.similarity_matrices(list(found.data), matrices),
            f"Similarity of data sets, the mean over {count} layer inputs.",
        )


def _spectra(found: Analysis, report: Report, show: Callable[[str, Figure, str], None]) -> None:
    from kore.report import figures

    report.section(
        "Spectra",
        "Eigenvalues of C relative to the largest. Effective rank: (Σλ)² / Σλ², the number of directions that share "
        "the energy.",
    )
    show(
        "spectra",
        figures.spectra_by_kind(found.spectra),
        "A row for each data set, a column for each kind of input, a line for each layer from dark (first) to light.",
    )
    kinds = _by_kind(list(found.inputs))
    rows: list[list[Any]] = []
    for kind, groups in kinds.items():
        means = [_mean(found.inputs[group][name]["effective_rank"] for group in groups) for name in found.data]
        rows.append([kind, len(groups), *means])
    report.table(["input", "layers", *found.data], rows, "Effective rank, the mean over layers.", digits=1)


def _leak(found: Analysis, report: Report, show: Callable[[str, Figure, str], None]) -> None:
    from kore.report import figures

    report.section(
        "What the adapter reads",
        "Leak: the share ‖xU‖² / ‖x‖² of the inputs' energy in the rows of A. Energy ratio E: the leak over the least "
        "that as many directions can have on the same data; 1 is perfect on the data of the calibration, and on other "
        "data it says how far their quiet directions are others. Where data leave directions out altogether, E on them "
        "has no upper end.",
    )
    leaks = _per_layer(found, "leak")
    spectra = next(iter(found.spectra.values()))
    leaks["random directions"] = {
        module: found.rank[module] / len(spectra[found.input_of[module]]) for module in found.layers
    }
    show("leak", figures.leak_per_layer(leaks), "Leak of every layer. Dashed: random directions, rank / d_in.")
    _kind_table(found, report, {"leak": "leak", "energy_ratio": "E"}, "Medians over the layers of a kind.")


def _retention(found: Analysis, report: Report, show: Callable[[str, Figure, str], None]) -> None:
    from kore.report import figures

    if not any(entry["change"] for sets in found.layers.values() for entry in sets.values()):
        report.section("What the adapter changes", "Nothing: B is zero, the adapter is not trained.")
        return
    relative = all("change_ratio" in entry for sets in found.layers.values() for entry in sets.values())
    suffix, over = ("_ratio", " / ‖W0 x‖") if relative else ("", "")
    report.section(
        "What the adapter changes",
        f"‖ΔW x‖{over} over the data of a covariance, and its bound ‖ΔB‖₂ √tr(A C Aᵀ){over}: the second factor is "
        "fixed with A, so that training cannot move old outputs further than its ‖ΔB‖₂ allows. A layer far above the "
        "others leaked.",
    )
    label = f"‖ΔW x‖{over}"
    changes = _per_layer(found, f"change{suffix}")
    show("change", figures.leak_per_layer(changes, label), "Change of every layer's outputs.")
    keys = {f"change{suffix}": "change", f"bound{suffix}": "bound"}
    _kind_table(found, report, keys, "Medians over the layers of a kind.")


def _rates(found: Analysis, report: Report) -> None:
    reference = next(iter(found.rates.values())).reference_rate
    report.section(
        "A learning rate to begin with",
        "The rate at which Adam's first steps move the outputs on a data set as far as those of a LoRA of rank 128, "
        f"alpha 256, at {reference:g}: the median over the layers. It means something for data of the new knowledge "
        "only; on old data, held out or not, A is quiet by construction and the rate comes out too high.",
    )
    rows = [
        [name, *(f"{value:.2g}" for value in (rate.learning_rate, *rate.spread))] for name, rate in found.rates.items()
    ]
    report.table(["data", "learning rate", "lowest of a layer", "highest"], rows)


def _reconstruction(found: Analysis, report: Report, show: Callable[[str, Figure, str], None]) -> None:
    from kore.report import figures

    seen = next(iter(found.data))
    how = "; ".join(f"{method} takes the svd of {scaled}" for method, scaled in METHODS.items())
    report.section(
        "Reconstruction",
        f"‖(W0 − W_r) x‖ / ‖W0 x‖ with the r smallest components of a weight discarded: {how}, and maps the rest back. "
        f"C is that of {seen}; the error is exact for every data set. Means over the layers of a kind.",
    )
    kinds = _by_kind(list(found.reconstruction))
    for name in found.data:
        panels = {kind: _mean_curves(found, modules, name) for kind, modules in kinds.items()}
        remark = " (the data of C)" if name == seen else ""
        show(f"reconstruction-{_file(name)}", figures.discard_curves(panels), f"Errors on {name}{remark}.")
    modules = list(found.reconstruction)
    rows = []
    for name in found.data:
        curves = _mean_curves(found, modules, name)
        for share in _SHARES:
            rows.append([name, f"{share:.1%}", *(float(np.interp(share, *curve)) for curve in curves.values())])
    report.table(["data", "discarded", *METHODS], rows, "Mean error over all layers.", digits=4)


def _mean_curves(found: Analysis, modules: list[str], name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    grid = np.linspace(0, 1, 33)
    curves = {}
    for method in METHODS:
        lines = []
        for module in modules:
            entry = found.reconstruction[module]
            points = np.array(entry["discarded"])
            lines.append(np.interp(grid, points / points[-1], entry["errors"][method][name]))
        curves[method] = (grid, np.mean(lines, axis=0))
    return curves


def _kind_table(found: Analysis, report: Report, keys: Mapping[str, str], caption: str) -> None:
    columns = [f"{label}, {name}" for name in found.data for label in keys.values()]
    rows: list[list[Any]] = []
    for kind, modules in {**_by_kind(list(found.layers)), "all": list(found.layers)}.items():
        values = [_median(found.layers[module][name][key] for module in modules) for name in found.data for key in keys]
        rows.append([kind, len(modules), *(f"{value:.3g}" for value in values)])
    report.table(["kind", "layers", *columns], rows, caption)


def _per_layer(found: Analysis, key: str) -> dict[str, dict[str, float]]:
    return {name: {module: sets[name][key] for module, sets in found.layers.items()} for name in found.data}


def _by_kind(modules: list[str]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for module in modules:
        kinds.setdefault(module_kind(module), []).append(module)
    return kinds


def _representatives(groups: list[str]) -> list[str]:
    return [names[len(names) // 2] for names in list(_by_kind(groups).values())[:_MAP_ROWS]]


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _median(values: Any) -> float:
    return float(np.median(list(values)))


def _file(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name)


def _text(value: Any) -> Any:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} = {entry}" for name, entry in value.items())
    return str(value) if isinstance(value, Path) else value
