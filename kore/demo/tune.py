"""Chooses the learning rate of every method by one rule: `python -m kore.demo.tune OUTPUT`.

The rule: among the rates 0.001 · 2^k, the one with the highest Avg (mean of K.A and K.R) on the validation worlds,
whose creatures, drawings, digit pictures and wordings are never those of the comparison. From a starting rate the
neighbours are tried until the best rate has both its neighbours measured. Every number measured is stored.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kore.artifacts import atomic_write
from kore.demo.methods import FULL, METHODS, TUNED, Budget

VALIDATION_WORLDS = (101,)
RULE = (
    "the rate 0.001 · 2^k with the highest Avg on the validation worlds; neighbours are tried until the best rate "
    "has both of its own measured"
)
_START = {"full": -1, "lora": 1, "kore": 6, "kore-no-constraint": 3, "kore-no-augmentation": 5}


def rate(k: int) -> float:
    """0.001 · 2^k."""
    return 0.001 * 2.0**k


def climb(start: int, measure: Callable[[int], float]) -> int:
    """The k with the highest value, both its neighbours measured, walking up from `start`."""
    values = {start: measure(start)}
    while True:
        best = max(values, key=values.__getitem__)
        missing = [k for k in (best - 1, best + 1) if k not in values]
        if not missing:
            return best
        values.update({k: measure(k) for k in missing})


def tune(directory: Path, worlds: tuple[int, ...], methods: list[str], budget: Budget = FULL) -> dict[str, Any]:
    """Choose the rates, resumably, and return what `tuned.json` holds."""
    from rich.console import Console

    from kore.demo.comparison import Comparison, quiet_libraries

    quiet_libraries()
    comparison = Comparison(directory, budget, Console(), old_split="validation")
    comparison.prepare()
    inputs = [comparison.world(seed, world, "validation")[0] for seed, world in enumerate(worlds)]
    measured: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in methods}

    def average(name: str, k: int) -> float:
        cells = []
        for seed, given in enumerate(inputs):
            cell = comparison.cell(f"{name}-{rate(k):g}", METHODS[name], given, rate(k), seed)
            cells.append({key: round(cell[key], 3) for key in ("ka", "kr", "avg")})
        measured[name][f"{rate(k):g}"] = cells
        return statistics.mean(cell["avg"] for cell in cells)

    chosen = {name: rate(climb(_START[name], lambda k, name=name: average(name, k))) for name in methods}  # type: ignore[misc]
    return {
        "rule": RULE,
        "worlds": list(worlds),
        "budget": budget.as_dict(),
        "checkpoint_sha256": comparison.recipe["sha256"],
        "chosen": chosen,
        "measured": {
            name: dict(sorted(cells.items(), key=lambda item: float(item[0]))) for name, cells in measured.items()
        },
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
    print(json.dumps({"measured": result["measured"], "chosen": result["chosen"]}, indent=1))


if __name__ == "__main__":
    main()
