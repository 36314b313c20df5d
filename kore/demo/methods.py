"""The five methods of the comparison, their budget, and the learning rate each was given."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from kore.errors import ConfigError

TUNED = Path(__file__).parent / "data" / "tuned.json"
LORA_RANK = 32
KORE_RANK = "match-lora-32"
PROJECTOR_RATE = 2e-5


@dataclass(frozen=True)
class Method:
    """A row of the comparison: how the model is prepared (kore.baselines), on which data."""

    label: str
    prepare: str
    augmented: bool = True

    @property
    def rank(self) -> int | str:
        return LORA_RANK if self.prepare == "lora" else KORE_RANK


METHODS = {
    "full": Method("Full-FT", "full"),
    "lora": Method("LoRA", "lora"),
    "kore": Method("KORE", "kore"),
    "kore-no-constraint": Method("KORE without constraint", "random-a"),
    "kore-no-augmentation": Method("KORE without augmentation", "kore", augmented=False),
}


@dataclass(frozen=True)
class Budget:
    """What every method gets alike."""

    steps: int
    batch_size: int
    questions_per_fact: int
    old_questions_per_task: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


FULL = Budget(steps=120, batch_size=24, questions_per_fact=3, old_questions_per_task=40)
QUICK = Budget(steps=45, batch_size=24, questions_per_fact=2, old_questions_per_task=20)


def chosen(names: list[str] | None) -> dict[str, Method]:
    """The methods asked for, in table order; all of them for None."""
    for name in names or ():
        if name not in METHODS:
            raise ConfigError(f"methods: expected names out of {', '.join(METHODS)}, got {name!r}")
    return {name: method for name, method in METHODS.items() if names is None or name in names}


def tuned_learning_rates() -> dict[str, float]:
    """Learning rate by method, as `python -m kore.demo.tune` chose them on the validation world."""
    return dict(json.loads(TUNED.read_text(encoding="utf-8"))["chosen"])
