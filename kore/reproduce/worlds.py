"""The worlds of a reproduction, and what is measured in each before any training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kore.artifacts import atomic_write, read_json
from kore.reproduce.prepare import QUICK_SIZES, SIZES, Sizes, World, prepare_world
from kore.reproduce.pretrain import FULL, QUICK, Schedule, prepare_tower
from kore.reproduce.studies import LLAVA

BEFORE = "before.json"


@dataclass(frozen=True)
class Plan:
    """How a world is made.

    Attributes:
        family: Name of the family.
        world: Its number.
        directory: Where the worlds are.
        schedule: Of the pre-training.
        sizes: Of the data.
        split: Whose questions are asked.
    """

    family: str
    world: int
    directory: Path
    schedule: Schedule = FULL
    sizes: Sizes = SIZES
    split: str = "test"

    @classmethod
    def of(cls, family: str, world: int, directory: Path, quick: bool, split: str = "test") -> Plan:
        """With the usual schedule and sizes."""
        return cls(family, world, directory, QUICK if quick else FULL, QUICK_SIZES if quick else SIZES, split)

    def prepare(self) -> World:
        """The world; what is there is not made again."""
        return prepare_world(
            self.family, self.world, self.directory, schedule=self.schedule, sizes=self.sizes, log=_silent
        )


def _silent(_: str) -> None:
    """Pre-training in a process of its own has nowhere to tell how far it is."""


def make_tower(plan: Plan) -> dict[str, Any]:
    """The vision tower that the worlds of a family share."""
    _one_thread()
    return prepare_tower(plan.family, plan.directory / "towers" / plan.family, plan.schedule, _silent)


def make_world(plan: Plan) -> World:
    """Pre-train and write a world."""
    _one_thread()
    return plan.prepare()


def measure_world(plan: Plan, general: bool, findings: bool, output: Path) -> dict[str, Any]:
    """Covariances, generally augmented data, the untouched model's marks and what the two findings rest on.

    Args:
        plan: Of a world that is there.
        general: Whether generally augmented data are wanted.
        findings: Whether the findings are.
        output: For the untouched model's answers and ``before.json``, which is written last.

    Returns:
        What ``before.json`` holds: the marks of the untouched model, and ``findings``.
    """
    from kore.reproduce import inputs
    from kore.reproduce.findings import measure

    _one_thread()
    world = plan.prepare()
    inputs.captured(world)
    if general and plan.family == LLAVA:
        inputs.write_general(world)
    key = {
        "checkpoint": world.about["sha256"],
        "split": plan.split,
        "sizes": vars(plan.sizes),
        "findings": findings,
    }
    done = output / BEFORE
    if done.is_file() and read_json(done)["key"] == key:
        return dict(read_json(done))
    before = {"key": key, **inputs.untouched(world, plan.split, output)}
    if findings:
        before["findings"] = measure(world, plan.split)
    atomic_write(done, json.dumps(before, indent=1))
    return before


def _one_thread() -> None:
    import torch

    from kore.demo.comparison import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()
