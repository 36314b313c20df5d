"""Chooses learning rate and strength of every row by one rule, on worlds that no table is of.

See :data:`kore.reproduce.settings.RULE`. Every number measured is stored; cells that are finished are not run again.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kore.artifacts import atomic_write
from kore.environment import environment
from kore.errors import KoreError
from kore.reproduce import cell
from kore.reproduce.prepare import VALIDATION_WORLDS, World
from kore.reproduce.settings import MOST, RULE, TUNED, Setting, read_tuned, search, start, tuned_rows
from kore.reproduce.studies import AUGMENTED, LLAVA, Row
from kore.reproduce.tasks import Say, workers
from kore.reproduce.worlds import Plan, make_tower, make_world, measure_world

SPLIT = "validation"


class Tuning:
    """The search for all rows, and the file of what was found, which is written anew after each row.

    Args:
        directory: Of the cells.
        worlds: Validation worlds by family, prepared.
        pool: Where cells run.
        budget: Of every cell.
        file: What is found.
        say: Is told a line for each cell.
        runner: Runs one.
    """

    def __init__(
        self,
        directory: Path,
        worlds: dict[str, list[World]],
        pool: Executor,
        budget: cell.Budget,
        file: Path,
        say: Say,
        runner: Callable[[cell.Job], dict[str, Any]] = cell.run,
    ) -> None:
        self.directory, self.worlds, self.pool, self.budget = directory, worlds, pool, budget
        self.file, self.say, self.runner = file, say, runner
        self.about = {
            "rule": RULE,
            "most": MOST,
            "budget": asdict(budget),
            "worlds": {
                name: [{"world": each.world, "checkpoint": each.about["sha256"]} for each in given]
                for name, given in worlds.items()
            },
        }
        self._writing = threading.Lock()

    def row(self, row: Row) -> Setting:
        """Search for one row and note what was found."""
        measured: list[dict[str, Any]] = []

        def measure(settings: list[Setting]) -> Sequence[float]:
            jobs = [
                cell.Job(row, world, setting, self._folder(row, setting, world), budget=self.budget, split=SPLIT)
                for setting in settings
                for world in self.worlds[row.family]
            ]
            cells = [future.result() for future in [self.pool.submit(self.runner, job) for job in jobs]]
            count, values = len(self.worlds[row.family]), []
            for number, setting in enumerate(settings):
                own = cells[number * count : (number + 1) * count]
                values.append(sum(one["avg"] for one in own) / count)
                measured.append(_measured(setting, row, own))
                self.say(f"{row.id}: {json.dumps(measured[-1])}")
            return values

        chosen = search(start(row), measure)
        found = {
            "identity": row.identity(),
            "chosen": {"rate": chosen.rate, "strength": chosen.strength},
            "learning_rate": chosen.learning_rate,
            "strength": chosen.strength_of(row),
            "measured": measured,
        }
        with self._writing:
            rows = read_tuned(self.file)["rows"]
            values = {**self.about, "rows": {**rows, row.id: found}, "environment": environment()}
            atomic_write(self.file, json.dumps(values, indent=1) + "\n")
        return chosen

    def _folder(self, row: Row, setting: Setting, world: World) -> Path:
        name = f"{setting.learning_rate:g}" + ("" if setting.strength is None else f"-{setting.strength_of(row):g}")
        return self.directory / row.family / row.name / f"{name}-world-{world.world}"


def _measured(setting: Setting, row: Row, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    means = {key: round(sum(one[key] for one in cells) / len(cells), 2) for key in ("ka", "kr", "avg")}
    return {"learning_rate": setting.learning_rate, "strength": setting.strength_of(row), **means}


def tune(
    directory: str | os.PathLike[str],
    say: Say = print,
    rows: Sequence[str] | None = None,
    processes: int = 2,
    file: Path | None = None,
) -> dict[str, Any]:
    """Measure on the validation worlds and write the file of settings; resumable.

    The cells run in processes of their own, so a script that calls this needs an `if __name__ == "__main__":` guard.

    Args:
        directory: For worlds and cells; what is finished there is not run again.
        say: Is told a line now and then.
        rows: Ids of rows; None for all that are searched for. The others keep what is in the file.
        processes: At a time.
        file: What is found; None for that of the package, which the reproduction reads.

    Returns:
        What the file holds.

    Raises:
        KoreError: There is no such row, or a cell fails.
    """
    home, file = Path(directory), file or TUNED
    known = {row.id: row for row in sorted(tuned_rows(), key=lambda row: (row.family != LLAVA, row.data != AUGMENTED))}
    for name in rows or ():
        if name not in known:
            raise KoreError(f"rows: expected names out of {', '.join(known)}, got {name!r}")
    chosen = [known[name] for name in rows] if rows else list(known.values())
    pool = workers(processes)
    try:
        worlds = _worlds(list(dict.fromkeys(row.family for row in chosen)), home, pool, say)
        tuning = Tuning(home / "tuning", worlds, pool, cell.FULL, file, say)
        with ThreadPoolExecutor(processes + 1) as threads:
            for future in [threads.submit(tuning.row, row) for row in chosen]:
                future.result()
    finally:
        pool.shutdown(cancel_futures=True)
    return read_tuned(file)


def _worlds(families: Sequence[str], home: Path, pool: Executor, say: Say) -> dict[str, list[World]]:
    plans = {
        name: [Plan.of(name, world, home / "worlds", False, SPLIT) for world in VALIDATION_WORLDS] for name in families
    }
    towers = {name: pool.submit(make_tower, each[0]) for name, each in plans.items()}
    making = {}
    for name, each in plans.items():
        towers[name].result()
        making[name] = [pool.submit(make_world, plan) for plan in each]
    worlds = {name: [future.result() for future in futures] for name, futures in making.items()}
    asked = [
        pool.submit(measure_world, plan, False, False, home / "tuning" / name / f"untouched-world-{plan.world}")
        for name, each in plans.items()
        for plan in each
    ]
    for name, world, future in zip((one for one in plans for _ in plans[one]), VALIDATION_WORLDS * len(plans), asked):
        marks = future.result()
        say(f"{name} world {world}: untouched, K.A {marks['ka']:.1f}, K.R {marks['kr']:.1f}")
    return worlds
