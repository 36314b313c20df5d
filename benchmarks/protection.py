"""What protects old knowledge: KORE's variants and neighbours side by side on the world of `kore demo`.

    python -m benchmarks.protection WORK [--quick] [--variants balanced two-sided] [--worlds 3] [--processes 1]

Learning rate, and λ of two-sided protection, are searched for each variant on a validation world by one rule; then all
is frozen and every variant runs on the test worlds. Cells that are finished in WORK are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import kore
from benchmarks.protection_cells import (
    FIRST_STRENGTH,
    VARIANTS,
    Job,
    Setting,
    Variant,
    capture,
    finished,
    make,
    merged,
    run,
)
from kore.artifacts import atomic_write
from kore.demo.methods import FULL, LORA_RANK, QUICK, Budget, tuned_learning_rates
from kore.environment import environment
from kore.errors import KoreError
from kore.metrics import hars

RESULT = Path(__file__).parent / "results" / "protection.json"
NEW_SAMPLES = 256
VALIDATION_WORLD, FIRST_TEST_WORLD = 101, 1
MOST_CELLS = 6
RULE = (
    "learning rates 0.001 · 2^k and, with two-sided protection, λ = 2 · 4^j: from a starting point the neighbours of "
    "the setting with the highest Avg on the validation world are tried, those of λ first, until it has all of its own "
    "measured, or as many settings are as most_settings says. With a demo key the rate is the one that kore.demo.tune "
    "chose for this method on the same world by the same rule"
)
BASELINE = "balanced"
COLUMNS = {"K.A": "ka", "K.R": "kr", "Avg": "avg", "HARS": "hars"}


def search(start: Setting, measure: Callable[[list[Setting]], list[float]], most: int = MOST_CELLS) -> Setting:
    """The setting with the highest value that a climb from ``start`` finds; see :data:`RULE`."""
    values = dict(zip([start], measure([start])))
    while True:
        best = max(values, key=values.__getitem__)
        missing = [setting for setting in best.neighbours() if setting not in values][: most - len(values)]
        if not missing:
            return best
        values.update(zip(missing, measure(missing)))


class Study:
    """All cells of a working directory, and the file of results, which is written anew after each.

    Args:
        directory: Of the cells.
        output: The file.
        budget: Of every cell.
        pool: Where cells run.
        most: Settings that a search may measure.
        runner: What runs one, or None for one that shall be left out, which a search cannot do.
    """

    def __init__(
        self,
        directory: Path,
        output: Path,
        budget: Budget,
        pool: Executor,
        most: int = MOST_CELLS,
        runner: Callable[[Job], dict[str, Any] | None] = run,
    ) -> None:
        self.directory, self.output, self.budget, self.pool, self.runner = directory, output, budget, pool, runner
        self.most = most
        self.inputs: dict[int, Any] = {}
        self.before: dict[int, dict[str, Any]] = {}
        self.found: dict[str, dict[str, Any]] = {}
        self._writing = threading.Lock()

    def prepare(self, tests: int) -> None:
        """Write the worlds' data, ask the untouched model, capture the old groups."""
        from rich.console import Console

        from kore.data import load_conversations
        from kore.demo.cell import load_start
        from kore.demo.comparison import Comparison, quiet_libraries

        quiet_libraries()
        worlds = {"validation": [VALIDATION_WORLD], "test": [FIRST_TEST_WORLD + number for number in range(tests)]}
        for split, numbers in worlds.items():
            comparison = Comparison(self.directory / split, self.budget, Console(), old_split=split)
            comparison.prepare()
            for seed, world in enumerate(numbers):
                inputs, self.before[world] = comparison.world(seed, world, split)
                self.inputs[world] = replace(inputs, encoder=None, covariance=None)
        old = self.directory / "old"
        if not old.is_dir():
            files = (self.directory / "test" / "data" / "old").glob("*.json")
            groups = {file.stem: load_conversations(file) for file in sorted(files)}
            model = load_start(comparison.checkpoint)
            capture(model, comparison.encoder, groups, self.directory / "old.partial")
            (self.directory / "old.partial").rename(old)

    def tests(self) -> list[int]:
        """The test worlds."""
        return [world for world in self.inputs if world != VALIDATION_WORLD]

    def measure(self, name: str, variant: Variant, settings: Sequence[Setting]) -> list[float]:
        """Avg of settings on the validation world."""
        cells = self._cells(name, "validation", [(VALIDATION_WORLD, 0, setting) for setting in settings], variant)
        return [cell["avg"] for cell in cells]

    def variant(self, name: str, variant: Variant) -> None:
        """Search, freeze, test."""
        self.found[name] = {"label": variant.label, **_described(variant), "validation": [], "test": []}
        if variant.demo is None:
            start = Setting(variant.start, FIRST_STRENGTH if variant.gradients else None)
            chosen = search(start, lambda settings: self.measure(name, variant, settings), self.most)
        else:
            chosen = Setting(round(math.log2(1000 * tuned_learning_rates()[variant.demo])))
        self.found[name]["chosen"] = _setting(chosen)
        self._cells(name, "test", [(world, seed, chosen) for seed, world in enumerate(self.tests())], variant)

    def match_rates(self) -> None:
        """Note beside every frozen A the rate that :func:`kore.analysis.rates.step_matched_rate` gives from 256
        training samples of the validation world and the demo's LoRA."""
        from kore.analysis.rates import step_matched_rate
        from kore.data import conversation_batches
        from kore.demo.cell import load_start
        from kore.demo.comparison import CAPTURE_BATCH
        from kore.demo.encoding import CachedEncoder

        inputs = self.inputs[VALIDATION_WORLD]
        encoder, step = CachedEncoder.from_pretrained(inputs.checkpoint), max(1, len(inputs.augmented) // NEW_SAMPLES)
        batches = conversation_batches(inputs.augmented[::step][:NEW_SAMPLES], encoder, CAPTURE_BATCH)
        new = kore.capture_covariance(load_start(inputs.checkpoint), batches, progress=False)
        for name, found in self.found.items():
            variant = VARIANTS[name]
            if variant.method in ("full", "lora") or variant.config.get("train_a"):
                continue
            cov = merged(self.directory / "old", "covariance", variant.merge)
            model = make(load_start(inputs.checkpoint), variant, cov, 0)
            matched = step_matched_rate(model, new, tuned_learning_rates()["lora"], LORA_RANK)
            found["step_matched_rate"] = matched.learning_rate
        atomic_write(self.output, json.dumps(self.results(), indent=1) + "\n")

    def _cells(
        self, name: str, split: str, wanted: Sequence[tuple[int, int, Setting]], variant: Variant
    ) -> list[dict[str, Any]]:
        futures = []
        for world, seed, setting in wanted:
            folder = f"{name}-{setting.learning_rate:g}" + ("" if setting.penalty is None else f"-{setting.penalty:g}")
            directory = self.directory / "cells" / f"world-{world}" / folder
            job = Job(variant, setting, self.inputs[world], world, seed, self.budget, self.directory / "old", directory)
            futures.append(self.pool.submit(self.runner, job))
        cells = []
        for (world, _, setting), future in zip(wanted, futures):
            cell = future.result()
            if cell is not None:
                cells.append(cell)
                self._note(name, split, world, setting, cell)
            elif split == "validation":
                raise KoreError(f"{name}: the search is not finished; run it without --collect")
        return cells

    def _note(self, name: str, split: str, world: int, setting: Setting, cell: dict[str, Any]) -> None:
        before = self.before[world]
        row = {
            "world": world,
            **_setting(setting),
            **{key: cell[key] for key in ("ka", "kr", "avg")},
            "hars": hars(cell["ka"], cell["kr"], before["ka"], before["kr"]),
            "seconds": cell["train_seconds"],
        }
        with self._writing:
            self.found[name]["trained_parameters"] = cell["trainable"]
            self.found[name][split].append(row)
            atomic_write(self.output, json.dumps(self.results(), indent=1) + "\n")
        print(f"{split} {name}: {json.dumps({key: _round(value) for key, value in row.items()})}", flush=True)

    def results(self) -> dict[str, Any]:
        """What the file holds."""
        before = {str(world): {key: marks[key] for key in ("ka", "kr", "avg")} for world, marks in self.before.items()}
        return {
            "rule": RULE,
            "most_settings": self.most,
            "budget": self.budget.as_dict(),
            "validation_world": VALIDATION_WORLD,
            "test_worlds": self.tests(),
            "before": before,
            "variants": {name: self.found[name] for name in VARIANTS if name in self.found},
            "environment": environment(),
        }


def summary(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each variant that has been tested: means over the test worlds, and how its Avg and HARS differ from
    those of :data:`BASELINE`, paired by world, with a 95 % interval of Student's t."""
    variants = {name: found for name, found in results["variants"].items() if found["test"]}
    rows = []
    for name, found in variants.items():
        cells = {row["world"]: row for row in found["test"]}
        base = {row["world"]: row for row in variants.get(BASELINE, {"test": []})["test"]}
        shared = sorted(cells.keys() & base.keys())
        rows.append(
            {
                "name": name,
                "label": found["label"],
                "trained_parameters": found["trained_parameters"],
                "learning_rate": found["chosen"]["learning_rate"],
                "penalty": found["chosen"]["penalty"],
                "worlds": len(cells),
                **{column: _mean([row[key] for row in cells.values()]) for column, key in COLUMNS.items()},
                **{
                    f"{column} lead": interval([cells[world][key] - base[world][key] for world in shared])
                    for column, key in (("Avg", "avg"), ("HARS", "hars"))
                    if name != BASELINE and shared
                },
            }
        )
    return rows


def interval(differences: Sequence[float]) -> dict[str, float | None]:
    """Mean, and half the width of the 95 % interval of Student's t; None for one difference."""
    from scipy.stats import t

    n = len(differences)
    half = None if n < 2 else float(t.ppf(0.975, n - 1)) * statistics.stdev(differences) / n**0.5
    return {"mean": statistics.mean(differences), "half": half}


def _mean(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": statistics.mean(values), "spread": statistics.stdev(values) if len(values) > 1 else None}


def _described(variant: Variant) -> dict[str, Any]:
    return {name: value for name, value in asdict(variant).items() if name not in ("label", "start")}


def _setting(setting: Setting) -> dict[str, float | None]:
    return {"learning_rate": setting.learning_rate, "penalty": setting.penalty}


def _round(value: Any) -> Any:
    return round(value, 2) if isinstance(value, float) and abs(value) > 1 else value


def plus_minus(value: dict[str, float | None] | None, width: str, spec: str) -> str:
    """A mean and what stands beside it, as text."""
    if value is None:
        return "–"
    beside = value[width]
    return format(value["mean"], spec) + ("" if beside is None else f" ± {beside:.1f}")


def show(results: dict[str, Any]) -> None:
    """The summary in the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Mean ± standard deviation over test worlds", title_justify="left")
    for heading in ("variant", "rate", "λ", "worlds", *COLUMNS, "Avg lead"):
        table.add_column(heading)
    for row in summary(results):
        means = [plus_minus(row[column], "spread", ".1f") for column in COLUMNS]
        shown = plus_minus(row.get("Avg lead"), "half", "+.1f")
        penalty = "–" if row["penalty"] is None else f"{row['penalty']:g}"
        table.add_row(row["label"], f"{row['learning_rate']:g}", penalty, str(row["worlds"]), *means, shown)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="working directory")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--worlds", type=int, default=3, help="test worlds")
    parser.add_argument("--most", type=int, default=MOST_CELLS, help="settings that a search may measure")
    parser.add_argument("--processes", type=int, default=1, help="cells at a time, each on one thread")
    parser.add_argument("--output", type=Path, help=f"default: {RESULT}; with --quick, in the working directory")
    parser.add_argument("--collect", action="store_true", help="run no cell: write and show those that are finished")
    parser.add_argument("--quick", action="store_true", help="few steps, one test world, no search: does it run?")
    arguments = parser.parse_args()
    output = arguments.output or (arguments.work / RESULT.name if arguments.quick else RESULT)
    pool = ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn"))
    try:
        budget, most = (replace(QUICK, steps=4), 1) if arguments.quick else (FULL, arguments.most)
        study = Study(arguments.work, output, budget, pool, most, finished if arguments.collect else run)
        study.prepare(1 if arguments.quick else arguments.worlds)
        with ThreadPoolExecutor(len(arguments.variants)) as threads:
            started = [threads.submit(study.variant, name, VARIANTS[name]) for name in arguments.variants]
            for future in started:
                future.result()
        study.match_rates()
    finally:
        pool.shutdown(cancel_futures=True)
    show(study.results())


if __name__ == "__main__":
    main()
