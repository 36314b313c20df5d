"""lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval): ten of the twelve benchmarks, one process for each.

The engine's exit status is 0 whatever happens, and a judge that does not answer gives a score of 0. So everything is
looked for before the start, and only a finite number of the wanted name in the results file is a score.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from kore.retention.benchmarks import BENCHMARKS, Benchmark, Task
from kore.retention.engines import base
from kore.retention.engines.base import Asked, Outcome, Settings
from kore.retention.engines.process import command, probe, read_log, run

_NEEDED = (
    "lmms_eval",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "pydantic",
    "scipy",
    "rich",
    "PIL",
    "jinja2",
    "yaml",
)
_ENGINE = ("loguru", "sacrebleu", "evaluate", "pytz", "tenacity", "datasets", "pytablewriter", "requests")
_PACKAGES = {
    "lmms_eval": "lmms-eval",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "dotenv": "python-dotenv",
    "antlr4": "antlr4-python3-runtime==4.7.2",
}
_ALONE = ("latex2sympy2", "antlr4")
"""To be installed without their requirements, which contradict those of other packages."""
_BUILDERS = ("json", "parquet", "csv", "text", "arrow", "imagefolder")
_UNREACHABLE = re.compile(
    r"Couldn't reach '([^']+)'|Couldn't find any data file at (\S+)|Dataset '([^']+)' doesn't exist"
)
_SPLIT = re.compile(r"Error during evaluation: '(test|testmini|validation|val|dev|image)'\.", re.MULTILINE)
_JUDGE_FAILURES = re.compile(
    r"All \d+ attempts failed|Invalid eval_score|Failed to obtain answer|Attempt \d+ failed|Missing credentials"
)


class LmmsEval:
    """Runs tasks of lmms-eval with KORE's own model class.

    Args:
        settings: Of the run.
        python: The interpreter that has lmms-eval; its packages often contradict those of training.
        include: Folders with tasks of one's own.
        benchmarks: Those that may be asked for.
    """

    name = "lmms-eval"

    def __init__(
        self,
        settings: Settings,
        python: str | None = None,
        include: Iterable[Path] = (),
        benchmarks: Iterable[Benchmark] = BENCHMARKS,
    ) -> None:
        self.settings = settings
        self.python = python or sys.executable
        self._include = [Path(one).absolute() for one in include]
        self._benchmarks = list(benchmarks)

    @cached_property
    def _found(self) -> dict[str, Any]:
        tasks = [one.lmms_eval for one in self._benchmarks if one.lmms_eval is not None]
        modules = sorted({*_NEEDED, *_ENGINE, *(module for task in tasks for module in task.modules)})
        return probe(
            self.python,
            {
                "modules": modules,
                "distribution": "lmms_eval",
                "tasks": [task.name for task in tasks],
                "include": [str(one) for one in self._include],
            },
        )

    def version(self) -> str | None:
        return self._found["version"] or ("unknown" if "lmms_eval" not in self._found["missing"] else None)

    def problems(self, benchmark: Benchmark) -> list[str]:
        task = _task(benchmark)
        missing = set(self._found["missing"])
        if "lmms_eval" in missing:
            return [
                f"lmms-eval: {self.python} -m pip install lmms-eval, "
                "or --lmms-python with another interpreter that has it"
            ]
        problems = []
        wanted = [name for name in (*_NEEDED, *_ENGINE, *task.modules) if name in missing]
        if wanted:
            problems.append(_install(self.python, wanted))
        found = self._found["tasks"].get(task.name)
        if found is None:
            problems.append(f"task {task.name}: lmms-eval {self.version()} has none of that name; 0.7 or newer has")
        else:
            problems += self._data_problem(found)
        return problems + base.judge_problem(task, self.settings)

    def identity(self, benchmark: Benchmark) -> dict[str, Any]:
        from kore.pipeline.stage import directory_identity

        task, settings = _task(benchmark), self.settings
        own = {"include": [directory_identity(one) for one in self._include]} if self._include else {}
        return {
            "engine": self.name,
            "task": task.name,
            **own,
            "data_root": None if settings.data_root is None else str(settings.data_root.absolute()),
            "limit": settings.limit,
            "max_new_tokens": settings.max_new_tokens,
            **base.judge_identity(task, settings),
        }

    def run(self, benchmark: Benchmark, asked: Asked, folder: Path) -> Outcome:
        task, settings = _task(benchmark), self.settings
        fields = base.start(benchmark, self.name, self.version(), settings)
        work = folder / "run"
        shutil.rmtree(work, ignore_errors=True)
        (work / "out").mkdir(parents=True)
        local = Path(asked.model).is_dir()
        linked = {"out": work / "out", "journal": folder}
        linked |= {"model": Path(asked.model)} if local else {}
        linked |= {"adapter": asked.adapter} if asked.adapter is not None else {}
        linked |= {f"include{number}": one for number, one in enumerate(self._include)}
        with base.plain_paths(**linked) as links:
            model = {
                "pretrained": links["model"] if local else asked.model,
                "adapter": links.get("adapter"),
                "dtype": asked.dtype,
                "journal": f"{links['journal']}/answers.jsonl",
                "max_new_tokens": settings.max_new_tokens,
            }
            words = ["--model", "kore", "--model_args", ",".join(f"{k}={v}" for k, v in model.items() if v is not None)]
            words += ["--tasks", task.name, "--batch_size", str(settings.batch_size), "--device", asked.device]
            words += ["--output_path", links["out"], "--log_samples"]
            words += ["--limit", str(settings.limit)] if settings.limit is not None else []
            for name in links:
                words += ["--include_path", links[name]] if name.startswith("include") else []
            ended = run(
                command(self.python, "lmms", words),
                folder / "log.txt",
                cwd=work if settings.data_root is None else settings.data_root,
                environment=self._environment(task, work),
                time_limit=settings.time_limit,
            )
        shutil.rmtree(work / "cache", ignore_errors=True)
        fields |= {"seconds": round(ended.seconds, 1), "log": str(ended.log)}
        log = read_log(ended.log)
        results = _results(work / "out", task.name)
        problem = _judge_trouble(task, log) if results is not None else self._why(log) or ended.why()
        if problem is None and results is not None:
            metrics, count, whole = results
            try:
                score = task.score(metrics)
            except KeyError as error:
                problem = f"no score: in the results {error.args[0]}"
            else:
                if settings.limit is None and whole is not None and count != whole:
                    problem = f"only {count} of {whole} questions were asked"
                else:
                    return Outcome(state="done", score=score, metrics=metrics, count=count, **fields)
        return Outcome(state="failed", reasons=(base.without_key(f"{problem}; log: {ended.log}"),), **fields)

    def _environment(self, task: Task, work: Path) -> dict[str, str | None]:
        settings = self.settings
        values = base.offline_environment(settings)
        if settings.data_root is not None:
            # A cache of its own, so that changed files are not taken for those converted before.
            values["HF_DATASETS_CACHE"] = str(work / "cache")
        for name in ("OPENAI_API_URL", "MODEL_VERSION", "API_TYPE"):
            values[name] = None
        if task.judge is None:
            return {**values, base.KEY: None}
        values |= {base.KEY: os.environ.get(base.KEY) or "none", "API_TYPE": "openai"}
        if settings.judge_model is not None:
            values["MODEL_VERSION"] = settings.judge_model
        if settings.judge_url is not None:
            url = settings.judge_url.rstrip("/")
            values["OPENAI_API_URL"] = url if task.judge_url == "base" else f"{url}/chat/completions"
        return values

    def _data_problem(self, found: Mapping[str, Any]) -> list[str]:
        data, root = found["data"], self.settings.data_root
        if not data or data in _BUILDERS or Path(data).is_absolute() or self.settings.hub:
            return []
        if root is not None:
            if _has_files(root / data):
                return []
            get = f"hf download --repo-type dataset {data} --local-dir {root / data}"
            return [f"data set {data}: expected at {root / data}; {get}"]
        if any(_has_files(one) for one in _cached(data)):
            return []
        return [
            f"data set {data}: not in the hub's cache; hf download --repo-type dataset {data}, "
            "or keep it below a folder given as --data-root, or --hub to let the engine download it"
        ]

    def _why(self, log: str) -> str | None:
        """Data that could not be had, said plainly."""
        found = _UNREACHABLE.search(log)
        if found is None:
            split = _SPLIT.search(log)
            return None if split is None else f"the data set that was found has no split {split[1]!r}: is it whole?"
        data = next(group for group in found.groups() if group)
        return f"data set {data} is neither below --data-root nor in the hub's cache, or only a part of it"


def _task(benchmark: Benchmark) -> Task:
    assert benchmark.lmms_eval is not None, benchmark.name
    return benchmark.lmms_eval


def _install(python: str, modules: Iterable[str]) -> str:
    """Which packages are missing, and the commands that install them."""
    names = list(dict.fromkeys(modules))
    alone = [_PACKAGES.get(name, name) for name in names if name in _ALONE]
    others = [_PACKAGES.get(name, name) for name in names if name not in _ALONE]
    commands = [f"{python} -m pip install {' '.join(others)}"] if others else []
    commands += [f"{python} -m pip install --no-deps {' '.join(alone)}"] if alone else []
    return f"packages {', '.join(others + alone)}: {' && '.join(commands)}"


def _cached(data: str) -> list[Path]:
    """Where Hugging Face's libraries keep a data set."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    datasets = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets")
    return [hub / f"datasets--{data.replace('/', '--')}" / "snapshots", datasets / data.replace("/", "___").lower()]


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(entry.is_file() for entry in folder.rglob("*"))


def _results(out: Path, task: str) -> tuple[dict[str, Any], int | None, int | None] | None:
    """Metrics without the name of their filter, questions asked, and questions there are; None without results."""
    for file in sorted(out.rglob("*_results.json"), reverse=True):
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
            found = value["results"][task]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        metrics = {
            name.removesuffix(",none"): number
            for name, number in found.items()
            if name != "alias" and "_stderr" not in name
        }
        counts = value.get("n-samples", {}).get(task, {})
        return metrics, counts.get("effective"), counts.get("original")
    return None


def _judge_trouble(task: Task, log: str) -> str | None:
    """A judge that failed on some rows scored them 0: such a score is none."""
    failures = len(_JUDGE_FAILURES.findall(log)) if task.judge is not None else 0
    return f"the judge failed {failures} times, and the engine scores that 0" if failures else None
