"""What is compared: every row of every table of the paper, as data.

A row is a method on some data; in which tables and figures it stands, the row says itself. All adapters have the
trained parameters of a LoRA of rank :data:`LORA_RANK`, 14 % of those of the layers they adapt (in the paper 5 %).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from kore.reproduce.families import Llava, QwenVL
from kore.reproduce.world.old import DIMENSIONS

LORA_RANK = 16
RANK = f"match-lora-{LORA_RANK}"
RANKS = (8, 16, 60)
"""Of the sweep, beside :data:`RANK`."""
LLAVA, QWEN = Llava.name, QwenVL.name
PREVIOUS_STEPS = 40
SAMPLES = 128

AUGMENTED, PLAIN = "augmented", "plain"
GENERAL = ("text-agnostic", "image-aware", "image-agnostic")
"""The general augmentations that need no language model; ``text-aware`` does, so it is left out."""
DATA = (AUGMENTED, PLAIN, *GENERAL)

TABLES: Mapping[str, str] = MappingProxyType(
    {
        "main": "Adaptation and retention (the paper's Table 1)",
        "dimensions": "Retention by dimension (the paper's Tables 1 and 2)",
        "types": "Adaptation by type of knowledge (the paper's Figure 5)",
        "specific": "A covariance of one dimension (the paper's Figure 6)",
        "architecture": "Another architecture (the paper's Table 3)",
        "ablation": "Ablation (the paper's Table 4)",
        "augmentation": "General augmentations (the paper's Table 5)",
        "rank": "Rank (the paper's Figure 7)",
        "losses": "Loss curves (the paper's Figure 10)",
        "cases": "Case study (the paper's Figures 13 and 14)",
    }
)


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: Unique in its family; of files and folders.
        label: In tables; unique among the rows of a family.
        method: Of :data:`kore.baselines.METHODS`.
        tables: Names out of :data:`TABLES`.
        family: Of :mod:`kore.reproduce.families`.
        data: The new data, out of :data:`DATA`.
        options: The method's own.
        rank: Of the adapter; None where there is none.
        groups: The dimensions whose covariances count; empty for all.
        merge: How they are added: "raw" (one sum over all tokens, the paper's) or "balanced" (each over its trace).
        train_a: Whether KORE's A is trained, too.
        two_sided: Whether two-sided protection is added; then the row has a strength.
        tuned_as: The row whose learning rate and strength are taken; its own where it is empty.
        quick: Whether ``--quick`` has it.
    """

    name: str
    label: str
    method: str
    tables: tuple[str, ...]
    family: str = LLAVA
    data: str = AUGMENTED
    options: Mapping[str, Any] = field(default_factory=dict)
    rank: int | str | None = RANK
    groups: tuple[str, ...] = ()
    merge: str = "balanced"
    train_a: bool = False
    two_sided: bool = False
    tuned_as: str = ""
    quick: bool = False

    @property
    def id(self) -> str:
        """Unique among all rows."""
        return f"{self.family}/{self.name}"

    @property
    def tuned_id(self) -> str:
        """The :attr:`id` of the row whose settings this one takes."""
        return f"{self.family}/{self.tuned_as or self.name}"

    def identity(self) -> dict[str, Any]:
        """What a cell of this row depends on, JSON-serialisable."""
        return {
            "family": self.family,
            "method": self.method,
            "data": self.data,
            "options": dict(self.options),
            "rank": self.rank,
            "groups": list(self.groups),
            "merge": self.merge,
            "train_a": self.train_a,
            "two_sided": self.two_sided,
        }


_LOSSES = ("full", "lora", "ewc", "o-lora", "sefe")
_CASES = ("full", "lora", "replay", "ewc")
_QUICK = ("full", "lora", "replay", "lwf")
_BASELINES: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("full", "Full-FT", {}),
    ("lora", "LoRA", {}),
    ("replay", "Replay", {}),
    ("ewc", "EWC", {"samples": SAMPLES}),
    ("lwf", "LwF", {}),
    ("moelora", "MoELoRA", {}),
    ("o-lora", "O-LoRA", {"previous_steps": PREVIOUS_STEPS}),
    ("sefe", "SEFE", {"previous_steps": PREVIOUS_STEPS}),
    ("cia", "CIA", {}),
)
BASELINES = tuple(name for name, _, _ in _BASELINES)
KORE, BALANCED, TWO_SIDED = "kore", "kore-balanced", "kore-two-sided"
"""The paper's method; with a balanced covariance; with that and two-sided protection, the strongest form here."""
SPECIFIC = {"comprehensive": "MME", "ocr": "OCRVQA", "math": "MathVista", "hallucination": "HallusionBench"}
"""Dimensions that get a covariance of their own, and the paper's benchmark in each."""


def plain(name: str) -> str:
    """Name of a baseline's row on the data without augmentation."""
    return f"{name}-plain"


def _baselines() -> list[Row]:
    rows = []
    for name, label, options in _BASELINES:
        rank = None if name == "full" else RANK
        main = ("main", "dimensions", "types")
        seen = (*(("losses",) if name in _LOSSES else ()), *(("cases",) if name in _CASES else ()))
        same = Row(name, f"{label}, same data", name, main, options=options, rank=rank, quick=name in _QUICK)
        rows += [
            replace(same, name=plain(name), label=label, data=PLAIN, tables=(*main, *seen), quick=name == "lora"),
            same,
            replace(same, label=label, family=QWEN, tables=("architecture",)),
        ]
    return rows


def _kore() -> list[Row]:
    where = ("main", "dimensions", "types")
    paper = Row(KORE, "KORE", "kore", where, merge="raw", quick=True)
    balanced = replace(paper, name=BALANCED, label="KORE, balanced C", merge="balanced")
    both = replace(balanced, name=TWO_SIDED, label="KORE, balanced C, two-sided", two_sided=True)
    others = ("specific", "ablation", "rank", "augmentation", "losses", "cases")
    return [
        replace(paper, tables=(*where, *others)),
        balanced,
        replace(both, tables=(*where, "losses", "cases")),
        *(replace(row, family=QWEN, tables=("architecture",)) for row in (paper, balanced, both)),
    ]


def _studies() -> list[Row]:
    kore = Row(KORE, "KORE", "kore", (), merge="raw", tuned_as=KORE)
    specific = [
        replace(
            kore, name=f"kore-{name}", label=f"KORE, C of {name}", groups=(name,), tables=("specific", "dimensions")
        )
        for name in SPECIFIC
    ]
    free = replace(kore, method="random-a", merge="balanced", tuned_as="kore-no-constraint")
    parts = ("ablation",)
    ablation = [
        replace(kore, name="kore-plain", label="w/o augmentation", data=PLAIN, tables=parts, tuned_as=""),
        replace(free, name="kore-no-constraint", label="w/o constraint", tables=(*parts, "augmentation"), tuned_as=""),
        replace(kore, name="kore-train-a", label="w/o frozen A", train_a=True, tables=parts, tuned_as=""),
    ]
    ranks = [replace(kore, name=f"kore-rank-{r}", label=f"KORE, rank {r}", rank=r, tables=("rank",)) for r in RANKS]
    general = [
        replace(free, name=f"general-{kind}", label=kind, data=kind, tables=("augmentation",)) for kind in GENERAL
    ]
    return [*specific, *ablation, *ranks, *general]


ROWS: tuple[Row, ...] = (*_baselines(), *_kore(), *_studies())
"""Every row once, baselines first."""
BY_ID: Mapping[str, Row] = MappingProxyType({row.id: row for row in ROWS})


def rows_of(table: str) -> tuple[Row, ...]:
    """The rows of a table, in its order.

    Raises:
        KeyError: There is no such table.
    """
    TABLES[table]
    return tuple(row for row in ROWS if table in row.tables)


def quick_rows() -> tuple[Row, ...]:
    """The rows of ``--quick``."""
    return tuple(row for row in ROWS if row.quick)


assert set(SPECIFIC) <= set(DIMENSIONS)
