"""What every engine has in common: the settings of a run, the model it asks, and what comes of a benchmark."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol

from kore.retention.benchmarks import Benchmark, Task

State = Literal["done", "missing", "failed"]
KEY = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Asked:
    """The model that a benchmark asks."""

    model: str
    adapter: Path | None = None
    dtype: str = "auto"
    device: str = "auto"


@dataclass(frozen=True)
class Settings:
    """How benchmarks are run.

    Attributes:
        data_root: Where data sets lie, as the engines lay them out; None: their own caches.
        hub: Whether missing data may be downloaded.
        batch_size: Questions at a time.
        max_new_tokens: A limit on what the tasks ask for; None leaves theirs.
        limit: Only the first so many questions of each, for a trial.
        judge_model: In place of the one each task names.
        judge_url: Base address of the judge's server, ``http://…/v1``; None: that of OpenAI.
        time_limit: Seconds for one benchmark.
    """

    data_root: Path | None = None
    hub: bool = False
    batch_size: int = 8
    max_new_tokens: int | None = None
    limit: int | None = None
    judge_model: str | None = None
    judge_url: str | None = None
    time_limit: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a benchmark.

    Attributes:
        name: Of the benchmark.
        dimension: Of the benchmark.
        state: ``"missing"``: it was not started, something it needs is not there; ``"failed"``: it gave no score.
        engine: And ``version`` and ``task``: what measured it.
        score: 0 to 100.
        metrics: What the engine says, by its names.
        count: Questions.
        limited: Whether these are only the first of them.
        judge: The judge model, if one was asked.
        reasons: Why there is no score, each with what to do.
        remarks: What to know about the score.
        seconds: How long it took.
        log: The engine's output.
    """

    name: str
    dimension: str
    state: State
    engine: str
    task: str
    version: str | None = None
    score: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    count: int | None = None
    limited: bool = False
    judge: str | None = None
    reasons: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    seconds: float | None = None
    log: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> Outcome:
        """Back from :meth:`as_json`."""
        texts = {name: tuple(value.get(name, ())) for name in ("reasons", "remarks")}
        return cls(**{**value, **texts})


class Engine(Protocol):
    """A program that runs benchmarks."""

    name: str
    settings: Settings

    def version(self) -> str | None:
        """Of the installed engine, or None where it is not there."""

    def problems(self, benchmark: Benchmark) -> list[str]:
        """What the benchmark still needs, each with what to do; empty where it can be run."""

    def identity(self, benchmark: Benchmark) -> dict[str, Any]:
        """What a score depends on beside the model."""

    def run(self, benchmark: Benchmark, asked: Asked, folder: Path) -> Outcome:
        """Run it, with ``folder`` for whatever it writes; ``folder/answers.jsonl`` is kept between runs."""


def start(benchmark: Benchmark, engine: str, version: str | None, settings: Settings) -> dict[str, Any]:
    """The fields of an outcome that do not depend on what comes of it."""
    task = benchmark.task(engine)
    assert task is not None
    return {
        "name": benchmark.name,
        "dimension": benchmark.dimension,
        "engine": engine,
        "task": task.name,
        "version": version,
        "limited": settings.limit is not None,
        "judge": judge_of(task, settings),
    }


def judge_of(task: Task, settings: Settings) -> str | None:
    """The judge model that a task asks, or None."""
    if task.judge is None or task.fixed_judge or settings.judge_model is None:
        return task.judge
    return settings.judge_model


def judge_problem(task: Task, settings: Settings) -> list[str]:
    """Whether a judge's key is missing. A server of one's own may need none, so an address is enough."""
    if task.judge is None or os.environ.get(KEY) or settings.judge_url:
        return []
    return [
        f"a judge model ({judge_of(task, settings)}): set {KEY} to its key, or --judge-url to a server of your own; "
        "without a judge the engine would score 0"
    ]


def judge_identity(task: Task, settings: Settings) -> dict[str, Any]:
    if task.judge is None:
        return {}
    return {"judge": judge_of(task, settings), "judge_url": settings.judge_url}


def offline_environment(settings: Settings) -> dict[str, str | None]:
    """Variables that keep Hugging Face's libraries off the network unless downloads are allowed."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    shared: dict[str, str | None] = {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    return shared if settings.hub else {**shared, **dict.fromkeys(names, "1")}


@contextmanager
def plain_paths(**paths: Path) -> Iterator[dict[str, str]]:
    """Links without commas and equals signs to directories: engines split arguments at these."""
    with TemporaryDirectory(prefix="kore-") as folder:
        links = {}
        for name, path in paths.items():
            link = Path(folder) / name
            link.symlink_to(path.absolute())
            links[name] = str(link)
        yield links


def without_key(text: str) -> str:
    """The text with the judge's key blotted out."""
    key = os.environ.get(KEY)
    return text.replace(key, "***") if key else text
