"""``kore reproduce --scale mini``: worlds, cells, tables, observations, report; it goes on where it was stopped."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kore.artifacts import atomic_write
from kore.environment import environment
from kore.errors import ConfigError, KoreError
from kore.reproduce import cell
from kore.reproduce.observations import observations
from kore.reproduce.prepare import TEST_WORLDS, World
from kore.reproduce.pretrain import ABOUT
from kore.reproduce.settings import read_tuned, setting_of
from kore.reproduce.studies import GENERAL, LLAVA, QWEN, ROWS, Row, quick_rows
from kore.reproduce.tables import Results, all_tables
from kore.reproduce.tasks import Outcome, Say, Task, minutes, run_tasks, workers
from kore.reproduce.worlds import Plan, make_tower, make_world, measure_world

COST = {"tower": 200.0, "world": 450.0, "measured": 60.0, "cell": 20.0}
"""Core-seconds of each sort of task, for the time left."""
_QUICK_SHARE = {"tower": 0.6, "world": 0.45, "measured": 0.5, "cell": 0.5}
RESULTS = "results.json"


def run_cell(row: Row, directory: Path, budget: cell.Budget, world: World) -> dict[str, Any]:
    """The cell of a row in a world, at the row's setting; see :func:`kore.reproduce.cell.run`."""
    return cell.run(cell.Job(row, world, setting_of(row), directory, seed=0, budget=budget))


class Reproduction:
    """One output directory: what is run, and where it is.

    Args:
        directory: Of everything.
        rows: What is compared.
        worlds: Numbers of the pre-trained worlds of each family.
        budget: Of every cell.
        quick: Short schedules and little data.
        plan: Makes the plan of a world; the usual one by default.
    """

    def __init__(
        self,
        directory: Path,
        rows: Sequence[Row] = ROWS,
        worlds: Sequence[int] = TEST_WORLDS,
        budget: cell.Budget = cell.FULL,
        quick: bool = False,
        plan: Callable[[str, int, Path], Plan] | None = None,
    ) -> None:
        self.directory, self.rows, self.worlds, self.budget, self.quick = directory, tuple(rows), worlds, budget, quick
        families = dict.fromkeys(row.family for row in rows)
        make = plan or (lambda family, world, home: Plan.of(family, world, home, quick))
        self.plans = {(family, world): make(family, world, directory / "worlds")
                      for world in worlds for family in sorted(families, key=lambda name: name == LLAVA)}  # fmt: skip

    def cell_folder(self, row: Row, world: int) -> Path:
        return self.directory / "cells" / row.family / row.name / f"world-{world}"

    def untouched_folder(self, family: str, world: int) -> Path:
        return self.directory / "cells" / family / "untouched" / f"world-{world}"

    def tasks(self) -> list[Task]:
        """Everything to do: towers, worlds, what is measured in them, cells; world after world."""
        share = _QUICK_SHARE if self.quick else dict.fromkeys(COST, 1.0)
        cost = {kind: seconds * share[kind] for kind, seconds in COST.items()}
        general = any(row.data in GENERAL for row in self.rows)
        found: list[Task] = []
        for family in dict.fromkeys(family for family, _ in self.plans):
            if family == QWEN:
                plan = self.plans[family, self.worlds[0]]
                there = (plan.directory / "towers" / family / "tower.json").is_file()
                found.append(Task(f"{family} tower", make_tower, (plan,), cost=cost["tower"], done=there))
        for (family, world), plan in self.plans.items():
            name, needs = f"{family} world {world}", (f"{family} tower",) if family == QWEN else ()
            model = plan.directory / family / f"world-{world}" / "model" / ABOUT
            found.append(Task(name, make_world, (plan,), needs, cost=cost["world"], done=model.is_file()))
            output = self.untouched_folder(family, world)
            arguments = (plan, general, not self.quick and family == LLAVA, output)
            there = (output / "before.json").is_file()
            found.append(Task(f"{name} measured", measure_world, arguments, (name,), cost=cost["measured"], done=there))
        for world in self.worlds:
            for row in self.rows:
                folder, name = self.cell_folder(row, world), f"{row.family} world {world}"
                found.append(
                    Task(
                        f"{row.id} world {world}",
                        run_cell,
                        (row, folder, self.budget),
                        needs=(f"{name} measured",),
                        takes=(name,),
                        cost=cost["cell"],
                        done=(folder / cell.CELL).is_file(),
                    )
                )
        return found

    def results(self, outcome: Outcome) -> Results:
        """What the tables are made of."""
        found = Results()
        for family, world in self.plans:
            marks = outcome.results.get(f"{family} world {world} measured")
            if marks is not None:
                found.before.setdefault(family, {})[world] = marks
        for row in self.rows:
            for world in self.worlds:
                done = outcome.results.get(f"{row.id} world {world}")
                if done is not None:
                    found.cells.setdefault(row.id, {})[world] = done
        return found


def run(
    output_dir: str | os.PathLike[str],
    quick: bool = False,
    say: Say = print,
    rows: Sequence[str] | None = None,
    processes: int = 2,
) -> dict[str, Any]:
    """Reproduce the paper's comparison in miniature.

    The work is done in processes of its own, so a script that calls this needs an `if __name__ == "__main__":` guard.

    Args:
        output_dir: Everything goes here: models, data, cells, tables as CSV and JSON, `results.json`, `report.html`.
            What is finished there is not run again.
        quick: One world of each family, the main methods, short schedules. It shows that everything runs, and proves
            nothing.
        say: Is told a line after each piece of work.
        rows: Ids of rows; None for all.
        processes: At a time, each on one thread.

    Returns:
        What `results.json` holds.

    Raises:
        ConfigError: There is no such row.
        KoreError: Some of the work failed; tables and report are written without it.
    """
    known = quick_rows() if quick else ROWS
    chosen = [row for row in known if rows is None or row.id in rows]
    for name in rows or ():
        if name not in {row.id for row in known}:
            raise ConfigError(f"rows: expected names out of {', '.join(row.id for row in known)}, got {name!r}")
    worlds = TEST_WORLDS[:1] if quick else TEST_WORLDS
    budget = cell.QUICK if quick else cell.FULL
    return reproduce(Reproduction(Path(output_dir), chosen, worlds, budget, quick), say, processes)


def reproduce(work: Reproduction, say: Say = print, processes: int = 2) -> dict[str, Any]:
    """Run all tasks of a reproduction, then write its tables and its report; returns what `results.json` holds."""
    from kore.reproduce.report import write_report

    started = time.perf_counter()
    tasks = work.tasks()
    outcome = run_tasks(tasks, workers(processes), processes, say, _describe)
    results = work.results(outcome)
    tables, claims = all_tables(results, work.rows), observations(results)
    values: dict[str, Any] = {
        "scale": "mini",
        "quick": work.quick,
        "worlds": list(work.worlds),
        "budget": vars(work.budget),
        "tables": {name: table.as_json() for name, table in tables.items()},
        "observations": [claim.as_json() for claim in claims],
        "cells": {row: list(cells.values()) for row, cells in results.cells.items()},
        "before": results.before,
        "failures": outcome.failures,
        "tuned": {key: value for key, value in read_tuned().items() if key not in ("rows", "environment")},
        "environment": environment(),
        "seconds": time.perf_counter() - started,
    }
    folder = work.directory / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        atomic_write(folder / f"{name}.csv", table.as_csv())
        atomic_write(folder / f"{name}.json", json.dumps(table.as_json(), indent=1) + "\n")
    atomic_write(folder / "observations.json", json.dumps(values["observations"], indent=1) + "\n")
    atomic_write(work.directory / RESULTS, json.dumps(values, indent=1))
    page = write_report(work, results, tables, claims, values)
    for claim in claims:
        say(f"{claim.name:>2}  {claim.verdict:14}  {claim.claim}")
    say(f"report: {page} ({minutes(values['seconds'])})")
    if outcome.failures:
        first, reason = next(iter(outcome.failures.items()))
        raise KoreError(f"{len(outcome.failures)} of {len(tasks)} pieces of work failed, the first {first}: {reason}")
    return values


def _describe(task: Task, result: Any) -> str:
    if not isinstance(result, dict) or "ka" not in result:
        return ""
    seconds = result.get("core_seconds")
    took = f" ({sum(seconds.values()):.0f} core-seconds)" if seconds else ""
    return f"K.A {result['ka']:.1f}, K.R {result['kr']:.1f}{took}"
