"""Chooses the learning rate of every method by one rule: `python -m kore.demo.tune OUTPUT`.

The rule: the rate of the method's grid with the highest Avg (mean of K.A and K.R) on the validation worlds, whose
creatures, drawings, digit pictures and wordings are never those of the comparison. Every number measured is stored.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from pathlib import Path
from typing import Any

from kore.artifacts import atomic_write
from kore.demo.methods import FULL, METHODS, TUNED, Budget

VALIDATION_WORLDS = (101, 102)
# Powers of two around each method’s best; a best rate at an end of its grid calls for a wider grid.
GRIDS = {
    "full": (1e-4, 3e-4, 1e-3, 2e-3, 4e-3),
    "lora": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    "kore": (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
    "kore-no-constraint": (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
    "kore-no-augmentation": (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2),
}


def tune(directory: Path, worlds: tuple[int, ...], methods: list[str], budget: Budget = FULL) -> dict[str, Any]:
    """Run the grid, resumably, and return what `tuned.json` holds."""
    from rich.console import Console

    from kore.demo.run import Comparison

    logging.getLogger("transformers").setLevel(logging.ERROR)
    comparison = Comparison(directory, budget, Console(), old_split="validation")
    comparison.prepare()
    measured: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in methods}
    for seed, world in enumerate(worlds):
        inputs, _ = comparison.world(seed, world, "validation")
        for name in methods:
            for rate in GRIDS[name]:
                cell = comparison.cell(f"{name}-{rate:g}", METHODS[name], inputs, rate, seed)
                numbers = {key: round(cell[key], 3) for key in ("ka", "kr", "avg")}
                measured[name].setdefault(f"{rate:g}", []).append(numbers)
    means = {
        name: {rate: statistics.mean(cell["avg"] for cell in cells) for rate, cells in by_rate.items()}
        for name, by_rate in measured.items()
    }
    return {
        "rule": "highest Avg = (K.A + K.R) / 2, mean over the validation worlds, in the grid listed under measured",
        "worlds": list(worlds),
        "budget": budget.as_dict(),
        "checkpoint_sha256": comparison.recipe["sha256"],
        "chosen": {name: float(max(means[name], key=means[name].__getitem__)) for name in methods},
        "mean_avg": {name: {rate: round(value, 2) for rate, value in by.items()} for name, by in means.items()},
        "measured": measured,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="working directory; finished cells there are not run again")
    parser.add_argument("--worlds", type=int, nargs="+", default=list(VALIDATION_WORLDS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--write", action="store_true", help=f"store the result as {TUNED.name} of the package")
    arguments = parser.parse_args()
    result = tune(arguments.output, tuple(arguments.worlds), arguments.methods)
    text = json.dumps(result, indent=1) + "\n"
    atomic_write(arguments.output / TUNED.name, text)
    if arguments.write:
        atomic_write(TUNED, text)
    print(json.dumps({"mean_avg": result["mean_avg"], "chosen": result["chosen"]}, indent=1))


if __name__ == "__main__":
    main()
