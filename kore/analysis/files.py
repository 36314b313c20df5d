"""The directory that ``kore analyze`` writes: numbers, tables, pictures and one page."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kore.artifacts import atomic_directory, atomic_write, save_tensors, write_manifest
from kore.report.figures import module_kind

if TYPE_CHECKING:
    from kore.analysis.run import Analysis

KIND = "analysis"


def write_analysis(found: Analysis, output: str | os.PathLike[str], settings: Mapping[str, Any]) -> Path:
    """Write an analysis as a directory, atomically; an earlier one there is replaced.

    ``analysis.json`` has every number but spectra and maps, which are in ``analysis.safetensors``; ``tables`` has
    CSV files, ``figures`` PNG files, and ``report.html`` everything on one page.

    Args:
        found: What was measured.
        output: The directory.
        settings: How, kept in ``analysis.json`` and shown on the page.
    """
    from kore.analysis.page import build_page
    from kore.report.figures import to_png

    report, figures = build_page(found, settings)
    with atomic_directory(output) as directory:
        for folder in ("tables", "figures"):
            (directory / folder).mkdir()
        content = {"settings": dict(settings), **found.to_json()}
        atomic_write(directory / "analysis.json", json.dumps(content, indent=1) + "\n")
        save_tensors(_tensors(found), directory / "analysis.safetensors")
        for name, (columns, rows) in _tables(found).items():
            with open(directory / "tables" / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(columns)
                writer.writerows(rows)
        for name, figure in figures.items():
            (directory / "figures" / f"{name}.png").write_bytes(to_png(figure))
        report.write(directory / "report.html")
        write_manifest(directory, KIND, {})
    return Path(output)


def _tensors(found: Analysis) -> dict[str, torch.Tensor]:
    tensors = {
        f"spectrum/{name}/{group}": values for name, groups in found.spectra.items() for group, values in groups.items()
    }
    for group, maps in found.maps.items():
        tensors |= {f"map/{name}/{group}": torch.from_numpy(cells) for name, cells in maps.items()}
    return tensors


def _tables(found: Analysis) -> dict[str, tuple[Sequence[str], list[list[Any]]]]:
    names = list(found.data)
    tables: dict[str, tuple[Sequence[str], list[list[Any]]]] = {
        "inputs": _flat(["input"], found.inputs),
        "similarity": (
            ["measure", "input", "data", *names],
            [
                [measure, group, name, *row]
                for measure, groups in found.similarity.items()
                for group, matrix in {"mean": found.mean_similarity(measure), **groups}.items()
                for name, row in zip(names, matrix.tolist())
            ],
        ),
    }
    if found.layers:
        tables["layers"] = _flat(["module"], found.layers)
    if found.reconstruction:
        tables["reconstruction"] = (
            ["module", "kind", "method", "data", "discarded", "error"],
            [
                [module, module_kind(module), method, name, discarded, error]
                for module, entry in found.reconstruction.items()
                for method, curves in entry["errors"].items()
                for name, curve in curves.items()
                for discarded, error in zip(entry["discarded"], curve)
            ],
        )
    return tables


def _flat(
    first: list[str], values: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> tuple[list[str], list[list[Any]]]:
    keys = list(next(iter(next(iter(values.values())).values())))
    rows = [
        [name, data, *(entry[key] for key in keys)] for name, sets in values.items() for data, entry in sets.items()
    ]
    return [*first, "data", *keys], rows
