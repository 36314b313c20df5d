"""All benchmarks of K.R for one model: what is missing is said, the rest is run, and a killed run goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kore.artifacts import atomic_write, read_json
from kore.errors import ArtifactError, ConfigError
from kore.metrics import knowledge_retention
from kore.retention.benchmarks import BENCHMARKS, DIMENSIONS, Benchmark
from kore.retention.engines.base import Asked, Engine, Outcome
from kore.retention.offline import Set, SuiteScores

SCORES, RECORD, ANSWERS, FOLDER, SUITE_FOLDER = "scores.json", "record.json", "answers.jsonl", "benchmarks", "suite"
Say = Callable[[str, str, str], None]


@dataclass(frozen=True)
class Retention:
    """What a model has kept.

    Attributes:
        model: The model that was asked, and ``adapter``, if it had one.
        outcomes: Of every benchmark that was wanted, in the order of the table.
        suite: Scores of the offline suite, which do not enter ``kr``.
    """

    model: str
    adapter: str | None
    outcomes: tuple[Outcome, ...]
    suite: SuiteScores | None = None
    names: tuple[str, ...] = field(default=tuple(one.name for one in BENCHMARKS))

    @property
    def scores(self) -> dict[str, float]:
        """By benchmark, 0 to 100; those without a score are left out."""
        return {one.name: one.score for one in self.outcomes if one.score is not None}

    @property
    def missing(self) -> dict[str, str]:
        """By benchmark why it has no score, also those of the twelve that were not wanted."""
        reasons = {one.name: "; ".join(one.reasons) for one in self.outcomes if one.score is None}
        wanted = {one.name for one in self.outcomes}
        return reasons | {name: "not asked for" for name in self.names if name not in wanted}

    @property
    def kr(self) -> float | None:
        """Mean of the scores there are: K.R only where :attr:`complete`."""
        return knowledge_retention(self.scores) if self.scores else None

    @property
    def complete(self) -> bool:
        """Whether all twelve have a score over all their questions."""
        return set(self.names) <= set(self.scores) and not any(one.limited for one in self.outcomes)

    @property
    def label(self) -> str:
        """K.R, or K.R with how many of the benchmarks it is over."""
        if self.complete:
            return "K.R"
        trial = ", a trial on a part of the questions" if any(one.limited for one in self.outcomes) else ""
        present = sum(name in self.scores for name in self.names)
        return f"K.R over {present} of {len(self.names)} benchmarks{trial}"

    @property
    def dimensions(self) -> dict[str, float]:
        """Means of each dimension's benchmarks, of those that have a score."""
        by_name = {one.name: one for one in self.outcomes if one.score is not None}
        found: dict[str, list[float]] = {}
        for one in by_name.values():
            found.setdefault(one.dimension, []).append(one.score or 0.0)
        order = [*DIMENSIONS, *sorted(set(found) - set(DIMENSIONS))]
        return {name: sum(found[name]) / len(found[name]) for name in order if name in found}

    def as_json(self) -> dict[str, Any]:
        """Everything, with the derived numbers for other programs to read."""
        return {
            "model": self.model,
            "adapter": self.adapter,
            "kr": self.kr,
            "kr_label": self.label,
            "complete": self.complete,
            "dimensions": self.dimensions,
            "missing": self.missing,
            "benchmarks": {one.name: one.as_json() for one in self.outcomes},
            "suite": None if self.suite is None else self.suite.as_json(),
        }


@dataclass(frozen=True)
class Plan:
    """A benchmark, the engine that is to run it, and what that needs; without needs it is ready."""

    benchmark: Benchmark
    engine: Engine
    problems: tuple[str, ...] = ()


def choose_engines(
    benchmarks: Iterable[Benchmark], lmms_eval: Engine, vlmevalkit: Engine, by_vlmevalkit: Iterable[str] = ()
) -> list[tuple[Benchmark, Engine]]:
    """Who runs what: lmms-eval what it has, VLMEvalKit the rest and those named in ``by_vlmevalkit``."""
    named = set(by_vlmevalkit)
    chosen: list[tuple[Benchmark, Engine]] = []
    for one in benchmarks:
        first = one.lmms_eval is not None and one.name not in named
        engine = lmms_eval if first else vlmevalkit
        if one.task(engine.name) is None:
            raise ConfigError(f"{one.name}: {engine.name} has no task for it")
        chosen.append((one, engine))
    return chosen


def plan(chosen: Iterable[tuple[Benchmark, Engine]]) -> list[Plan]:
    """What each benchmark needs, found without running anything."""
    return [Plan(one, engine, tuple(_problems(one, engine))) for one, engine in chosen]


def _problems(benchmark: Benchmark, engine: Engine) -> list[str]:
    try:
        return engine.problems(benchmark)
    except ConfigError as error:  # the interpreter does not start
        return [str(error)]


def run_retention(
    asked: Asked,
    output: str | os.PathLike[str],
    chosen: Sequence[tuple[Benchmark, Engine]],
    *,
    suite: Sequence[Set] = (),
    batch_size: int = 8,
    max_new_tokens: int = 64,
    say: Say | None = None,
    progress: bool = False,
) -> Retention:
    """Run benchmarks and the offline suite for one model.

    Every benchmark has a folder below ``output/benchmarks`` with the answers, the engine's log and ``record.json``. A
    score that is there for the same model, adapter and settings is kept, also when the engine is newer or its data have
    changed: delete the folder to measure anew. A benchmark that was stopped asks nothing twice. ``scores.json`` is
    written after each.

    Args:
        asked: The model.
        output: Of this model alone.
        chosen: From :func:`choose_engines`.
        suite: Sets of the offline suite, asked in this process.
        batch_size: Of the suite.
        max_new_tokens: Of the suite.
        say: Told the name, the state (runs, done, skipped) and a remark.
        progress: Show a bar where this process asks.

    Raises:
        DataError: A question of the suite cannot be asked. The benchmarks' scores are kept.
    """
    from kore.pipeline.stage import directory_identity, model_identity

    output = Path(output)
    model = {"model": model_identity(asked.model), "dtype": asked.dtype}
    model["adapter"] = directory_identity(asked.adapter) if asked.adapter is not None else ""
    outcomes: list[Outcome] = []
    tell = say or (lambda name, state, remark: None)
    adapter = None if asked.adapter is None else str(asked.adapter)
    for benchmark, engine in chosen:
        outcomes.append(_one(benchmark, engine, asked, output / FOLDER / benchmark.key, model, tell))
        _write(output, Retention(asked.model, adapter, tuple(outcomes)))
    scores = _suite(asked, suite, output / SUITE_FOLDER, batch_size, max_new_tokens, progress) if suite else None
    found = Retention(asked.model, adapter, tuple(outcomes), scores)
    _write(output, found)
    return found


def load_retention(directory: str | os.PathLike[str]) -> Retention:
    """Read what :func:`run_retention` wrote. Raises ArtifactError naming the file when it is missing or broken."""
    file = Path(directory) / SCORES
    value = read_json(file)
    try:
        outcomes = tuple(Outcome.of_json(one) for one in value["benchmarks"].values())
        suite = None if value["suite"] is None else SuiteScores.of_json(value["suite"])
        return Retention(value["model"], value["adapter"], outcomes, suite)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{file}: not written by kore retention ({error!r})") from None


def _one(
    benchmark: Benchmark, engine: Engine, asked: Asked, folder: Path, model: Mapping[str, str], tell: Say
) -> Outcome:
    identity = {**model, **engine.identity(benchmark)}
    kept = _kept(folder, identity, benchmark)
    if kept is not None:
        tell(benchmark.name, "skipped", f"{kept.score:.2f}, done before")
        return kept
    problems = _problems(benchmark, engine)
    if problems:
        tell(benchmark.name, "skipped", f"needs {'; '.join(problems)}")
        task = benchmark.task(engine.name)
        assert task is not None
        return Outcome(benchmark.name, benchmark.dimension, "missing", engine.name, task.name, reasons=tuple(problems))
    if _record(folder).get("identity") != identity:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    _record_as(folder, {"identity": identity, "outcome": None})
    tell(benchmark.name, "runs", f"{engine.name}, log: {folder / 'log.txt'}")
    outcome = engine.run(benchmark, asked, folder.absolute())
    _record_as(folder, {"identity": identity, "outcome": outcome.as_json()})
    if outcome.score is None:
        tell(benchmark.name, "skipped", "; ".join(outcome.reasons))
    else:
        tell(benchmark.name, "done", f"{outcome.score:.2f}")
    return outcome


def _kept(folder: Path, identity: Mapping[str, Any], benchmark: Benchmark) -> Outcome | None:
    """A score of before; it is made anew from the engine's metrics."""
    record = _record(folder)
    if record.get("identity") != identity or not record.get("outcome"):
        return None
    try:
        value = record["outcome"]
        task = benchmark.task(value["engine"])
        if value["state"] != "done" or task is None:
            return None
        return Outcome.of_json({**value, "score": task.score(value["metrics"])})
    except (KeyError, TypeError):
        return None


def _record(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _record_as(folder: Path, value: Mapping[str, Any]) -> None:
    atomic_write(folder / RECORD, json.dumps(value, indent=2) + "\n")


def _write(output: Path, found: Retention) -> None:
    atomic_write(output / SCORES, json.dumps(found.as_json(), indent=2) + "\n")


def _suite(
    asked: Asked, sets: Sequence[Set], output: Path, batch_size: int, max_new_tokens: int, progress: bool
) -> SuiteScores:
    from kore.evaluation import load_prompts
    from kore.models import load_model
    from kore.retention.offline import run_suite

    encoder = load_prompts(asked.model)
    model: Any = load_model(asked.model, dtype=asked.dtype, device=asked.device)
    if asked.adapter is not None:
        from kore.adapter import load_adapter

        model = load_adapter(model, asked.adapter)
    return run_suite(
        model, encoder, sets, output, batch_size=batch_size, max_new_tokens=max_new_tokens, progress=progress
    )
