"""``kore analyze``: what covariances look like, and what an adapter does to them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from kore.cli import console
from kore.errors import ConfigError


def analyze(
    covariances: Annotated[
        list[str], typer.Argument(metavar="[NAME=]COVARIANCE...", help="Results of kore capture on old data.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the result.")],
    new: Annotated[
        list[str] | None,
        typer.Option("--new", "-n", metavar="[NAME=]COVARIANCE", help="Of held-out or new data; may be repeated."),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", "-a", help="Adapter: leak, energy ratio, change.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Base model: reconstruction, and change relative to its outputs."),
    ] = None,
    modules: Annotated[str | None, typer.Option(help="Only layers whose name this expression matches.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Spectra, heat maps and similarity of covariances; leak and retention of an adapter; reconstruction of weights.

    Writes analysis.json, tables, pictures, and all of it on one page, report.html. With --model every weight is
    decomposed four times, which takes long for a large model: choose layers with --modules.

    Example: `kore analyze vqa=runs/vqa/covariance ocr=runs/ocr/covariance --new new=runs/a/covariance-new
    -a runs/a/train/adapter -o runs/a/analysis`
    """
    old, fresh = _named(covariances), _named(new or [])
    from kore.analysis.files import write_analysis
    from kore.analysis.run import analyze as measure

    found = measure(
        old, fresh, adapter=adapter, model=model, modules=modules, device=device, progress=console.interactive()
    )
    settings = {
        "old": {name: str(path) for name, path in old.items()},
        "new": {name: str(path) for name, path in fresh.items()},
        "adapter": None if adapter is None else str(adapter),
        "model": model,
        "modules": modules,
    }
    write_analysis(found, output, settings)
    for name, values in _leaks(found.layers).items():
        console.say(f"{name}: mean leak {sum(values) / len(values):.2e}")
    for name, rate in found.rates.items():
        console.say(f"{name}: learning rate {rate.learning_rate:.2g} steps as far as a LoRA's {rate.reference_rate:g}")
    console.say(f"report: {output / 'report.html'}")


def _named(words: Sequence[str]) -> dict[str, Path]:
    """``name=path``, or a path alone, which is called what its directory is called."""
    named: dict[str, Path] = {}
    for word in words:
        name, separator, path = word.partition("=")
        if not separator or "/" in name:
            name, path = Path(word).name, word
        if not name or not path:
            raise ConfigError(f"expected NAME=DIRECTORY or a directory, got {word!r}")
        if name in named:
            raise ConfigError(f"two covariances are called {name!r}; give each a name: NAME=DIRECTORY")
        named[name] = Path(path)
    return named


def _leaks(layers: dict[str, dict[str, dict[str, float]]]) -> dict[str, list[float]]:
    leaks: dict[str, list[float]] = {}
    for sets in layers.values():
        for name, entry in sets.items():
            leaks.setdefault(name, []).append(entry["leak"])
    return leaks
