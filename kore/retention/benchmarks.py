"""The twelve benchmarks of K.R: which ability each stands for, and how the engines name and scale it.

Dimensions and the choice of benchmarks are those of the paper (arXiv 2510.19316, section 4.1 and Table 1); it follows
VLMEvalKit. Task names, metric names and ranges are those of lmms-eval 0.7 and of VLMEvalKit of November 2026. Where the
paper does not say which of several scores of a benchmark it means, the table does:

* MME: (perception + cognition) / 2800, the two sums over 2000 and 800 points; 66.63 of the untouched LLaVA-1.5 7B is
  1865.6 points, its known total.
* HallusionBench: the mean of aAcc, qAcc and fAcc. The paper's 21.76 of the same model is too low for aAcc alone.
* POPE: F1, which VLMEvalKit calls Overall.

The engines mark differently (lmms-eval's POPE takes "Yes." for wrong, VLMEvalKit's does not), so scores of one
benchmark compare only within one engine; results name it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kore.errors import ConfigError

DIMENSIONS = ("COM", "OCR", "M-DIS", "INS", "M-IDU", "MAT", "HAL")
"""Comprehensive, OCR, multi-discipline, instruction following, multi-image dialogue, mathematics, hallucination."""


@dataclass(frozen=True)
class Task:
    """How one engine measures a benchmark.

    Attributes:
        name: Of the engine's task, or of its data set.
        keys: The metrics that make the score.
        scale: What their sum is multiplied by to give 0 to 100.
        judge: The judge model that the engine takes by itself; None where no judge is asked.
        fixed_judge: Whether another cannot be chosen.
        judge_url: Which address the task wants for a judge: the server's base (``…/v1``) or the very endpoint.
        modules: Python modules that the task imports, beside the engine's own.
        kind: VLMEvalKit's class of the data set.
        md5: Of VLMEvalKit's data file.
        empty_is_zero: Whether the engine writes null for a score of nothing right.
    """

    name: str
    keys: tuple[str, ...]
    scale: float = 1.0
    judge: str | None = None
    fixed_judge: bool = False
    judge_url: Literal["base", "endpoint"] = "endpoint"
    modules: tuple[str, ...] = ()
    kind: str = ""
    md5: str = ""
    empty_is_zero: bool = False

    def values(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """The metrics that make the score.

        A name may stand behind others: ``Overall`` is found as ``split=test|Overall`` where that is the only one.

        Raises:
            KeyError: One is not there, or is not a finite number.
        """
        return {key: self._value(metrics, key) for key in self.keys}

    def score(self, metrics: Mapping[str, Any]) -> float:
        """scale · Σ of the metrics; raises as :meth:`values`."""
        return self.scale * sum(self.values(metrics).values())

    def _value(self, metrics: Mapping[str, Any], key: str) -> float:
        found = [key] if key in metrics else [name for name in metrics if name.endswith(f"|{key}")]
        if len(found) != 1:
            raise KeyError(f"{key} is not among {', '.join(sorted(metrics)) or 'no metrics'}")
        value = metrics[found[0]]
        if value is None and self.empty_is_zero:
            return 0.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise KeyError(f"{key} is {value!r}")
        return float(value)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of K.R and its task in each engine that has it."""

    name: str
    dimension: str
    lmms_eval: Task | None = None
    vlmevalkit: Task | None = None

    @property
    def key(self) -> str:
        """The name as an option and a folder: lower case letters, digits and ``_``."""
        return key_of(self.name)

    def task(self, engine: str) -> Task | None:
        """Its task in ``"lmms-eval"`` or ``"vlmevalkit"``."""
        return self.lmms_eval if engine == "lmms-eval" else self.vlmevalkit


_CHOICES = "ImageMCQDataset"
_YES_NO = "ImageYORNDataset"
_TRIPLE = ("aAcc", "qAcc", "fAcc")

BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark(
        "MME",
        "COM",
        Task("mme", ("mme_perception_score", "mme_cognition_score"), 100 / 2800),
        Task("MME", ("perception", "reasoning"), 100 / 2800, kind=_YES_NO, md5="b36b43c3f09801f5d368627fb92187c3"),
    ),
    Benchmark(
        "MMBench",
        "COM",
        Task("mmbench_en_dev_static", ("gpt_eval_score",), modules=("pandas", "openpyxl", "requests")),
        Task("MMBench_DEV_EN", ("Overall",), 100, kind=_CHOICES, md5="b6caf1133a01c6bb705cf753bb527ed8"),
    ),
    Benchmark(
        "SEEDBench2_Plus",
        "OCR",
        Task("seedbench_2_plus", ("seedbench_2_plus_all",), 100),
        Task("SEEDBench2_Plus", ("Overall",), 100, kind=_CHOICES, md5="e32d3216dc4f452b0fe497a52015d1fd"),
    ),
    Benchmark(
        "OCRVQA",
        "OCR",
        None,
        Task("OCRVQA_TESTCORE", ("Overall",), kind="ImageVQADataset", md5="c5239fe77db8bdc1f2ad8e55e0d1fe97"),
    ),
    Benchmark(
        "ScienceQA",
        "M-DIS",
        Task("scienceqa_img", ("exact_match",), 100),
        Task("ScienceQA_TEST", ("Overall",), 100, kind=_CHOICES, md5="e42e9e00f9c59a80d8a5db35bc32b71f"),
    ),
    Benchmark(
        "MMMU",
        "M-DIS",
        Task("mmmu_val", ("mmmu_acc",), 100),
        Task(
            "MMMU_DEV_VAL",
            ("split=validation|Overall",),
            100,
            kind="MMMUDataset",
            md5="585e8ad75e73f75dcad265dfd0417d64",
        ),
    ),
    Benchmark(
        "MIA-Bench",
        "INS",
        Task("mia_bench", ("gpt_eval_score",), 100, judge="gpt-4o-2024-11-20", modules=("pandas", "requests")),
        Task(
            "MIA-Bench", ("total_score",), 100, judge="gpt-4o", kind="MIABench", md5="0b9de595f4dd40af18a69b94d89aba82"
        ),
    ),
    Benchmark(
        "MMDU",
        "M-IDU",
        None,
        Task(
            "MMDU",
            ("set=all|Overall Score",),
            judge="gpt-4o",
            kind="MMDUDataset",
            md5="848b635a88a078f49aebcc6e39792061",
        ),
    ),
    Benchmark(
        "MathVista",
        "MAT",
        Task(
            "mathvista_testmini_format",
            ("llm_as_judge_eval",),
            judge="gpt-4o-2024-11-20",
            judge_url="base",
            modules=("openai", "Levenshtein", "dotenv", "pandas"),
            empty_is_zero=True,
        ),
        Task(
            "MathVista_MINI",
            ("Task&Skill=Overall|acc",),
            judge="gpt-4o-mini",
            kind="MathVista",
            md5="f199b98e178e5a2a20e7048f5dcb0464",
        ),
    ),
    Benchmark(
        "MathVision",
        "MAT",
        Task("mathvision_test", ("mathvision_standard_eval",), modules=("latex2sympy2", "antlr4")),
        Task(
            "MathVision",
            ("Subject=Overall|acc",),
            judge="gpt-4o-mini",
            kind="MathVision",
            md5="93f6de14f7916e598aa1b7165589831e",
        ),
    ),
    Benchmark(
        "POPE",
        "HAL",
        Task("pope", ("pope_f1_score",), 100),
        Task("POPE", ("split=Overall|Overall",), kind=_YES_NO, md5="c12f5acb142f2ef1f85a26ba2fbe41d5"),
    ),
    Benchmark(
        "HallusionBench",
        "HAL",
        Task(
            "hallusion_bench_image",
            _TRIPLE,
            1 / 3,
            judge="gpt-4",
            fixed_judge=True,
            modules=("pandas", "requests"),
        ),
        Task(
            "HallusionBench",
            tuple(f"split=Overall|{key}" for key in _TRIPLE),
            1 / 3,
            kind=_YES_NO,
            md5="0c23ac0dc9ef46832d7a24504f2a0c7c",
        ),
    ),
)


def key_of(name: str) -> str:
    """A name in lower case with ``_`` for everything that is not a letter or digit."""
    return "".join(c if c.isalnum() else "_" for c in name.lower())


def select(names: Iterable[str], known: Iterable[Benchmark] = BENCHMARKS) -> list[Benchmark]:
    """The benchmarks of these names, in the order of the table; ``all`` means all.

    Case and signs do not matter: ``mia-bench``, ``MIA_Bench`` and ``miabench`` are one.

    Raises:
        ConfigError: A name is not in the table.
    """
    table = {_letters(one.name): one for one in known}
    wanted = [name.strip() for name in names if name.strip()]
    if not wanted:
        raise ConfigError(f"benchmarks: expected all, or some of {', '.join(one.name for one in table.values())}")
    unknown = [name for name in wanted if name.lower() != "all" and _letters(name) not in table]
    if unknown:
        names_known = ", ".join(one.name for one in table.values())
        raise ConfigError(f"benchmarks: expected all, or some of {names_known}; got {unknown[0]!r}")
    if any(name.lower() == "all" for name in wanted):
        return list(table.values())
    chosen = {_letters(name) for name in wanted}
    return [one for letters, one in table.items() if letters in chosen]


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
