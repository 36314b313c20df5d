"""The variants of the protection study, and one cell of it: a variant at a setting, trained and asked on one world."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from kore.artifacts import atomic_write
from kore.demo.cell import Inputs
from kore.demo.methods import KORE_RANK, LORA_RANK, Budget

FIRST_STRENGTH = 3
WHOLE_INPUT = 192  # the width of the demo's narrowest layer input, so the largest rank that every layer has
MERGES = ("raw", "tokens", "balanced")


@dataclass(frozen=True)
class Variant:
    """A row of the study.

    Attributes:
        label: In the table.
        method: Of :func:`kore.baselines.prepare_model`.
        merge: How the covariances of the old groups are added: ``"raw"``, ``"tokens"`` (each over its tokens, as in
            the demo) or ``"balanced"`` (each over its trace).
        config: Fields of :class:`kore.KoreConfig` that are not the default.
        gradients: What the output gradients of two-sided protection are captured on, ``"prompts"`` or ``"answers"``;
            None for no such protection. They are merged as the covariances are.
        start: The search begins at the learning rate 0.001 · 2^start and, with two-sided protection, at λ = 128.
        demo: The method of ``kore demo`` whose learning rate is taken; None to search for one.
    """

    label: str
    method: str = "kore"
    merge: str = "balanced"
    config: Mapping[str, Any] = field(default_factory=dict)
    gradients: str | None = None
    start: int = 6
    demo: str | None = None


VARIANTS = {
    "full": Variant("Full-FT", "full", demo="full"),
    "lora": Variant("LoRA", "lora", demo="lora"),
    "random": Variant("random frozen A", "random-a", demo="kore-no-constraint"),
    "raw": Variant("KORE, C added up", merge="raw", demo="kore"),
    "tokens": Variant("KORE, C / tokens", merge="tokens", demo="kore"),
    "balanced": Variant("KORE, balanced C", demo="kore"),
    "orthonormal": Variant("KORE, balanced C, orthonormal A", config={"scale": "orthonormal"}, start=5),
    "two-sided": Variant("KORE, balanced C, two-sided", gradients="prompts"),
    "two-sided-answers": Variant("KORE, balanced C, two-sided (G on answers)", gradients="answers"),
    "two-sided-random": Variant("random frozen A, two-sided", "random-a", gradients="prompts", start=3),
    "two-sided-whole": Variant(
        "whole input space, two-sided", config={"rank": WHOLE_INPUT}, gradients="prompts", start=3
    ),
    "train-a": Variant("KORE, balanced C, A trained", config={"train_a": True}, start=3),
    "half": Variant("KORE, balanced C, strength 0.5", config={"strength": 0.5}, start=4),
}


@dataclass(frozen=True)
class Setting:
    """A point of the search.

    Attributes:
        rate: The learning rate is 0.001 · 2^rate.
        strength: λ is 2 · 4^strength; None without two-sided protection.
    """

    rate: int
    strength: int | None = None

    @property
    def learning_rate(self) -> float:
        return 0.001 * 2.0**self.rate

    @property
    def penalty(self) -> float | None:
        return None if self.strength is None else 2.0 * 4.0**self.strength

    def neighbours(self) -> list[Setting]:
        """Those of λ before those of the rate, each with the larger one first."""
        found = []
        if self.strength is not None:
            found = [replace(self, strength=self.strength + step) for step in (1, -1)]
        return found + [replace(self, rate=self.rate + step) for step in (1, -1)]


@dataclass(frozen=True)
class Job:
    """A cell to run, as it travels to a process.

    Attributes:
        inputs: Without encoder and covariance, which a process loads for itself.
        old: The folder of the captured old groups.
        directory: Where the cell writes.
    """

    variant: Variant
    setting: Setting
    inputs: Inputs
    world: int
    seed: int
    budget: Budget
    old: Path
    directory: Path

    def key(self) -> dict[str, Any]:
        """What the result depends on."""
        variant = {
            name: value for name, value in asdict(self.variant).items() if name not in ("label", "start", "demo")
        }
        return {
            **variant,
            **self.budget.as_dict(),
            "learning_rate": self.setting.learning_rate,
            "penalty": self.setting.penalty,
            "world": self.world,
            "seed": self.seed,
            "checkpoint": self.inputs.checkpoint_sha256,
        }


def finished(job: Job) -> dict[str, Any] | None:
    """The cell where the same one is finished."""
    done = job.directory / "cell.json"
    cell: dict[str, Any] | None = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else None
    return cell if cell is not None and cell["key"] == job.key() else None


def run(job: Job) -> dict[str, Any]:
    """The cell, in this process on one thread, or as it was finished before."""
    import torch

    import kore
    from kore.demo.cell import load_start, train_and_ask
    from kore.demo.comparison import quiet_libraries

    if (known := finished(job)) is not None:
        return known
    torch.set_num_threads(1)
    quiet_libraries()
    variant = job.variant
    inputs = replace(job.inputs, encoder=_encoder(job.inputs.checkpoint))
    cov = merged(job.old, "covariance", variant.merge) if variant.method in ("kore", "random-a") else None
    model: Any = make(load_start(inputs.checkpoint), variant, cov, job.seed)
    protection = None
    if job.setting.penalty is not None:
        assert cov is not None and variant.gradients is not None
        gradients: Any = merged(job.old, f"gradients-{variant.gradients}", variant.merge)
        protection = kore.two_sided(model, cov, gradients, job.setting.penalty)
    cell = train_and_ask(
        model, inputs, inputs.augmented, job.setting.learning_rate, job.seed, job.budget, job.directory, protection
    )
    cell = {"key": job.key(), **cell}
    atomic_write(job.directory / "cell.json", json.dumps(cell, indent=1))
    return cell


def make(model: Any, variant: Variant, cov: Any, seed: int) -> Any:
    """The model made trainable by a variant's method."""
    import kore
    from kore import baselines

    if variant.method in ("full", "lora"):
        rank = LORA_RANK if variant.method == "lora" else None
        return baselines.prepare_model(model, variant.method, rank=rank, seed=seed, progress=False)
    constraint = "null_space" if variant.method == "kore" else "none"
    fields = {"rank": KORE_RANK, "constraint": constraint, "modules_to_save": "auto", "seed": seed, **variant.config}
    return kore.get_kore_model(model, cov, kore.KoreConfig(**fields), progress=False)


def capture(model: Any, encoder: Any, groups: Mapping[str, Any], folder: Path) -> None:
    """C and G of every group of old conversations, each in a folder of its own.

    C counts the tokens of prompts, as the demo does. G comes once from the same prompts, with a loss at their text
    and at the first token of the answer, and once from whole conversations with a loss at the answers.
    """
    import kore
    from kore.data import conversation_batches, prompt_batches
    from kore.demo.comparison import CAPTURE_BATCH

    for name, conversations in groups.items():
        prompts = prompt_batches(conversations, encoder, CAPTURE_BATCH)
        answered = conversation_batches(conversations, encoder, CAPTURE_BATCH)
        found = {
            "covariance": kore.capture_covariance(model, prompts, progress=False),
            "gradients-prompts": kore.capture_output_gradients(model, prompts, progress=False),
            "gradients-answers": kore.capture_output_gradients(model, answered, tokens="answer", progress=False),
        }
        for kind, matrices in found.items():
            matrices.save(folder / kind / name)


@lru_cache(maxsize=16)
def merged(folder: Path, kind: str, merge: str) -> Any:
    """The sets of all groups as one."""
    import kore

    load = kore.load_covariance if kind == "covariance" else kore.load_output_gradients
    sets = {path.name: load(path) for path in sorted((folder / kind).iterdir())}
    if merge == "tokens":
        weights: Any = [1 / each.tokens(each.modules[0]) for each in sets.values()]
    else:
        weights = "balanced" if merge == "balanced" else None
    return kore.merge_covariance(sets, weights=weights)


@lru_cache(maxsize=1)
def _encoder(checkpoint: Path) -> Any:
    from kore.demo.encoding import CachedEncoder

    return CachedEncoder.from_pretrained(checkpoint)
