"""The paper's eleven observations and two findings as claims about the tables, and which of them hold here.

A claim is made of parts, each that a number is above 0: a difference between two rows, paired by world. A part holds
where the 95 % interval over the worlds lies above 0, does not hold where it lies below, and otherwise cannot be told. A
claim holds where all its parts do, and does not hold where one of them does not. Intervals are not adjusted for their
number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from kore.reproduce.findings import CUTS, METHODS
from kore.reproduce.studies import BASELINES, GENERAL, KORE, LLAVA, QWEN, SPECIFIC, plain, rows_of
from kore.reproduce.tables import Results
from kore.statistics import Interval, seed_interval

Verdict = Literal["holds", "does not hold", "cannot be told"]
HOLDS: Verdict = "holds"
FAILS: Verdict = "does not hold"
OPEN: Verdict = "cannot be told"
_WEAK = ("full", "lora", "ewc", "lwf", "sefe", "cia")
"""The baselines whose K.R the paper's KORE exceeds."""


@dataclass(frozen=True)
class Part:
    """A number that ought to be above 0; None where it could not be measured."""

    text: str
    value: Interval | None

    @property
    def verdict(self) -> Verdict:
        value = self.value
        if value is None or value.low is None or value.high is None:
            return OPEN
        return HOLDS if value.low > 0 else FAILS if value.high < 0 else OPEN


@dataclass(frozen=True)
class Observation:
    """A claim of the paper and what became of it.

    Attributes:
        name: "1" to "11", "F1", "F2".
        claim: In words.
        paper: The paper's number.
        parts: What it is made of.
        remark: What differs here.
        like_for_like: The same claim with every baseline on KORE's own augmented data; empty where the claim has no
            baselines.
    """

    name: str
    claim: str
    paper: str
    parts: tuple[Part, ...]
    remark: str = ""
    like_for_like: tuple[Part, ...] = ()

    @property
    def verdict(self) -> Verdict:
        return overall(self.parts)

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON takes it."""
        return {
            "name": self.name,
            "claim": self.claim,
            "paper": self.paper,
            "verdict": self.verdict,
            "parts": [_part(part) for part in self.parts],
            "remark": self.remark,
            **(
                {
                    "like_for_like": {
                        "verdict": overall(self.like_for_like),
                        "parts": [_part(part) for part in self.like_for_like],
                    }
                }
                if self.like_for_like
                else {}
            ),
        }


def _part(part: Part) -> dict[str, Any]:
    value = None if part.value is None else part.value.as_json()
    return {"text": part.text, "verdict": part.verdict, "value": value}


def overall(parts: Sequence[Part]) -> Verdict:
    """The verdict over all parts; without any it cannot be told."""
    verdicts = [part.verdict for part in parts]
    if FAILS in verdicts:
        return FAILS
    return HOLDS if parts and all(verdict == HOLDS for verdict in verdicts) else OPEN


class _Claims:
    """Parts made of results."""

    def __init__(self, results: Results) -> None:
        self.results = results

    def above(self, row: str, others: Iterable[str], measure: str, family: str = LLAVA) -> tuple[Part, ...]:
        """That a row is above each of the others."""
        return tuple(
            Part(
                f"{_measure(measure)}: {row} − {other}",
                self.results.lead(f"{family}/{row}", f"{family}/{other}", measure),
            )
            for other in others
        )

    def over_worlds(self, text: str, families: Sequence[str], value: Callable[[int], float | None]) -> Part:
        """That a number of each world is above 0."""
        worlds = sorted({world for family in families for world in self.results.before.get(family, {})})
        found = [number for world in worlds if (number := value(world)) is not None]
        return Part(text, seed_interval(found) if found else None)

    def combined(self, text: str, terms: Sequence[tuple[float, str, str]], family: str = LLAVA) -> Part:
        """That Σ factor · measure of row is above 0, world by world."""
        columns = [(factor, self.results.values(f"{family}/{row}", measure)) for factor, row, measure in terms]

        def value(world: int) -> float | None:
            if any(world not in column for _, column in columns):
                return None
            return sum(factor * column[world] for factor, column in columns)

        return self.over_worlds(text, (family,), value)


def _measure(measure: str) -> str:
    names = {"ka": "K.A", "kr": "K.R", "avg": "Avg", "hars": "HARS", "tasks": "mean of tasks"}
    return names.get(measure, measure.partition(":")[2] or measure.upper())


def observations(results: Results) -> tuple[Observation, ...]:
    """All thirteen, in the paper's order."""
    claims = _Claims(results)
    first = (_adaptation, _retention, _balance, _fine_retention, _fine_adaptation)
    both = [make(claims, plain) for make in first]
    same = [make(claims, lambda name: name) for make in first]
    found = [_with(one, other.parts) for one, other in zip(both, same)]
    found += [
        _specific(claims),
        _larger(),
        _architecture(claims),
        _rank(claims),
        _ablation(claims),
        _augmentation(claims),
    ]
    return (*found, _reconstruction(claims), _similarity(claims))


def _with(observation: Observation, parts: tuple[Part, ...]) -> Observation:
    return replace(observation, like_for_like=parts)


Naming = Callable[[str], str]


def _adaptation(claims: _Claims, named: Naming) -> Observation:
    others = [named(name) for name in BASELINES]
    lora = named("lora")
    twice = claims.combined(f"K.A: {KORE} − 2 · {lora}", [(1, KORE, "ka"), (-2, lora, "ka")])
    return Observation(
        "1",
        "KORE learns more than every baseline, in CEM and in F1, and more than twice as much as LoRA.",
        "CEM +12.63 and F1 +17.14 over the best baseline; K.A 35.96 against LoRA's 16.77",
        (*claims.above(KORE, others, "cem"), *claims.above(KORE, others, "f1"), twice),
    )


def _retention(claims: _Claims, named: Naming) -> Observation:
    strongest = [
        part
        for dimension in ("ocr", "multi-discipline", "hallucination")
        for part in claims.above(KORE, [named(name) for name in _WEAK], f"dimensions:{dimension}")
    ]
    return Observation(
        "2",
        "KORE keeps more than Full-FT, LoRA, EWC, LwF, SEFE and CIA, also in OCR, M-DIS and HAL.",
        "K.R 40.00 against 31.66 to 35.99",
        (*claims.above(KORE, [named(name) for name in _WEAK], "kr"), *strongest),
    )


def _balance(claims: _Claims, named: Naming) -> Observation:
    others = [named(name) for name in BASELINES]
    return Observation(
        "3",
        "KORE has the best balance: its Avg and HARS are above those of every baseline.",
        "Avg +9.15 and HARS +15.25 over the best baseline",
        (*claims.above(KORE, others, "avg"), *claims.above(KORE, others, "hars")),
    )


def _fine_retention(claims: _Claims, named: Naming) -> Observation:
    return Observation(
        "4",
        "Over the single benchmarks KORE keeps more than LoRA on average.",
        "+6.53",
        claims.above(KORE, [named("lora")], "tasks"),
        "Here over the fourteen tasks. The part about rank 256 and other covariances is in observations 6 and 9.",
    )


def _fine_adaptation(claims: _Claims, named: Naming) -> Observation:
    from kore.reproduce.world.new import TYPES

    parts = [
        part for fact in TYPES for part in claims.above(KORE, [named(name) for name in BASELINES], f"types:{fact}")
    ]
    return Observation(
        "5",
        "KORE learns most of every type of knowledge.",
        "best on all 20 types",
        tuple(parts),
        f"There are {len(TYPES)} types here.",
    )


def _specific(claims: _Claims) -> Observation:
    parts = [part for name in SPECIFIC for part in claims.above(f"kore-{name}", [KORE], f"dimensions:{name}")]
    return Observation(
        "6",
        "A covariance of one dimension keeps that dimension better than one of all.",
        "MME +7.17 with the covariance of MME, at −1.50 K.A",
        tuple(parts),
        "The paper's are of single benchmarks, one in each of these dimensions.",
    )


def _larger() -> Observation:
    return Observation(
        "7",
        "With a larger model KORE's lead holds or grows.",
        "LLaVA-1.5 13B: Avg +11.10 and HARS +18.73 over Replay",
        (),
        "The miniature has one size of each family. `--scale paper` has the rows.",
    )


def _architecture(claims: _Claims) -> Observation:
    parts = [claims.above(KORE, ["replay"], measure, QWEN) for measure in ("avg", "hars")]
    return Observation(
        "8",
        "With Qwen2.5-VL, too, KORE has a better balance than Replay.",
        "Avg +3.19 and HARS +36.21",
        tuple(part for pair in parts for part in pair),
        "Replay is trained on the augmented data here, and not in the paper.",
    )


def _rank(claims: _Claims) -> Observation:
    rows = [row for row in rows_of("rank") if row.family == LLAVA]

    def size(row_id: str) -> int:
        cells = claims.results.cells.get(row_id, {})
        return next((int(cell["trainable"]) for cell in cells.values()), 0)

    ordered = sorted((row for row in rows if size(row.id)), key=lambda row: size(row.id))
    parts = []
    for measure in ("ka", "kr", "avg", "hars"):

        def trend(world: int, measure: str = measure) -> float | None:
            from scipy import stats

            values = [claims.results.values(row.id, measure).get(world) for row in ordered]
            if len(values) < 3 or any(value is None for value in values):
                return None
            if len(set(values)) == 1:
                return 0.0
            return float(stats.spearmanr(range(len(values)), values).statistic)

        parts.append(claims.over_worlds(f"{_measure(measure)}: rank correlation with the rank", (LLAVA,), trend))
    if ordered:
        parts += [
            part
            for measure in ("ka", "avg", "hars")
            for part in claims.above(ordered[0].name, [plain("replay")], measure)
        ]
    return Observation(
        "9",
        "A larger rank is better, and the smallest still beats Replay in K.A, Avg and HARS.",
        "K.A 28.54, 35.64, 35.96, 36.19 at rank 64, 128, 235, 256",
        tuple(parts),
    )


def _ablation(claims: _Claims) -> Observation:
    return Observation(
        "10",
        "Every part counts: without augmentation K.A falls, without constraint or with a trained A K.R falls.",
        "K.A −21.39; K.R −4.22 and −1.08",
        (
            *claims.above(KORE, ["kore-plain"], "ka"),
            *claims.above(KORE, ["kore-no-constraint", "kore-train-a"], "kr"),
        ),
    )


def _augmentation(claims: _Claims) -> Observation:
    others = [f"general-{kind}" for kind in GENERAL]
    parts = [claims.above("kore-no-constraint", others, measure) for measure in ("ka", "avg", "hars")]
    return Observation(
        "11",
        "KORE's augmentation is better than general ones, all without constraint.",
        "K.A +18.53, Avg +9.72 and HARS +9.61 over the best",
        tuple(part for one in parts for part in one),
        "The text-aware one needs a language model and is left out.",
    )


def _findings(claims: _Claims, world: int) -> dict[str, Any] | None:
    found: dict[str, Any] | None = claims.results.before[LLAVA].get(world, {}).get("findings")
    return found


def _reconstruction(claims: _Claims) -> Observation:
    parts = []
    for other in (method for method in METHODS if method != "co-svd"):
        for cut in CUTS:

            def better(world: int, other: str = other, cut: float = cut) -> float | None:
                found = _findings(claims, world)
                rebuilt = found and found["reconstruction"]
                return rebuilt["co-svd"][f"{cut:g}"] - rebuilt[other][f"{cut:g}"] if rebuilt else None

            parts.append(claims.over_worlds(f"K.R, {cut:.1%} dropped: co-svd − {other}", (LLAVA,), better))
    return Observation(
        "F1",
        "Rebuilt from its larger components, a model keeps most where the covariance decides what is large.",
        "ScienceQA with 1536 components dropped: 66.76 against 49.14 (ASVD) and 0.73 (SVD)",
        tuple(parts),
    )


def _similarity(claims: _Claims) -> Observation:
    def apart(world: int) -> float | None:
        found = _findings(claims, world)
        return found["similarity"]["within"] - found["similarity"]["across"] if found else None

    return Observation(
        "F2",
        "Covariances of related tasks are more alike than those of unrelated ones.",
        "shown for POPE, HallusionBench and MMBench",
        (claims.over_worlds("cosine within a dimension − across dimensions", (LLAVA,), apart),),
        "Related are tasks of one dimension.",
    )
