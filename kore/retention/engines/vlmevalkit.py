"""VLMEvalKit (github.com/open-compass/VLMEvalKit) from a checkout: it alone has OCRVQA and MMDU.

It is in no package index, so its folder is given. ``status: done`` is written for failures too: a score is a finite
number of the wanted name beside no error message.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

from kore.retention.benchmarks import Benchmark, Task
from kore.retention.engines import base
from kore.retention.engines.base import Asked, Outcome, Settings
from kore.retention.engines.process import command, probe, run

_NEEDED = ("torch", "transformers", "peft", "accelerate", "pydantic", "scipy", "rich", "PIL", "pandas", "requests")
_NAME = "kore"


class VlmEvalKit:
    """Runs data sets of VLMEvalKit with KORE's own model class.

    Args:
        settings: Of the run. ``data_root/LMUData`` holds the data where ``data_root`` is given.
        checkout: The folder with ``run.py``; None says what is missing.
        python: The interpreter that has its requirements.
    """

    name = "vlmevalkit"

    def __init__(self, settings: Settings, checkout: Path | None, python: str | None = None) -> None:
        self.settings = settings
        self.checkout = None if checkout is None else Path(checkout).absolute()
        self.python = python or sys.executable

    @cached_property
    def _found(self) -> dict[str, Any]:
        return probe(self.python, {"modules": list(_NEEDED), "distribution": "vlmeval"})

    @cached_property
    def _version(self) -> str | None:
        if self.checkout is None or not (self.checkout / "run.py").is_file():
            return None
        git = ["git", "-C", str(self.checkout), "rev-parse", "--short=12", "HEAD"]
        if (self.checkout / ".git").exists():
            done = subprocess.run(git, capture_output=True, text=True)
            if done.returncode == 0:
                return done.stdout.strip()
        return f"run.py {hashlib.sha256((self.checkout / 'run.py').read_bytes()).hexdigest()[:12]}"

    def version(self) -> str | None:
        """The commit of the checkout, or the beginning of the hash of its ``run.py``."""
        return self._version

    def problems(self, benchmark: Benchmark) -> list[str]:
        task = _task(benchmark)
        problems = []
        if self.checkout is None:
            problems.append(
                "VLMEvalKit: git clone https://github.com/open-compass/VLMEvalKit, install its requirements, "
                "and give the folder as --vlmevalkit"
            )
        elif not (self.checkout / "run.py").is_file() or not (self.checkout / "vlmeval").is_dir():
            problems.append(f"VLMEvalKit: {self.checkout} has no run.py and vlmeval; expected a checkout of it")
        elif self._found["missing"]:
            names = " ".join("pillow" if name == "PIL" else name for name in self._found["missing"])
            problems.append(f"packages {names}: {self.python} -m pip install {names}")
        file = self._data() / f"{task.name}.tsv"
        if not file.is_file() and not self.settings.hub:
            problems.append(f"data set {task.name}: expected at {file}, or --hub to let the engine download it")
        return problems + base.judge_problem(task, self.settings)

    def identity(self, benchmark: Benchmark) -> dict[str, Any]:
        task, settings = _task(benchmark), self.settings
        file = self._data() / f"{task.name}.tsv"
        return {
            "engine": self.name,
            "task": task.name,
            "data": str(file),
            "size": file.stat().st_size if file.is_file() else None,
            "max_new_tokens": settings.max_new_tokens,
            **base.judge_identity(task, settings),
        }

    def run(self, benchmark: Benchmark, asked: Asked, folder: Path) -> Outcome:
        task, settings = _task(benchmark), self.settings
        assert self.checkout is not None
        fields = {**base.start(benchmark, self.name, self.version(), settings), "limited": False}
        if settings.limit is not None:
            reason = "VLMEvalKit asks all questions of a data set or none; run it without --limit"
            return Outcome(state="failed", reasons=(reason,), **fields)
        work = folder / "run"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        model = {
            "class": "Kore",
            "model_path": asked.model,
            "adapter": None if asked.adapter is None else str(asked.adapter),
            "dtype": asked.dtype,
            "device": asked.device,
            "journal": str(folder / "answers.jsonl"),
        }
        if settings.max_new_tokens is not None:
            model["max_new_tokens"] = settings.max_new_tokens  # type: ignore[assignment]
        config = {"model": {_NAME: model}, "data": {task.name: {"class": task.kind, "dataset": task.name}}}
        (work / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        words = [str(self.checkout), "0" if settings.hub else "1", "--config", str(work / "config.json")]
        words += ["--work-dir", str(work / "out"), "--judge", base.judge_of(task, settings) or "exact_matching"]
        ended = run(
            command(self.python, "vlmevalkit", words),
            folder / "log.txt",
            cwd=work,
            environment=self._environment(task),
            time_limit=settings.time_limit,
        )
        fields |= {"seconds": round(ended.seconds, 1), "log": str(ended.log)}
        status = _status(work / "out", task.name)
        if status is None:
            problem = ended.why()
        elif status.get("error_message") or status.get("status") != "done":
            problem = status.get("error_message") or status.get("skip_reason") or f"status {status.get('status')}"
        else:
            metrics = status.get("metrics") or {}
            try:
                score = task.score(metrics)
                remarks = self._remarks(task)
                count = _count(self._data() / f"{task.name}.tsv")
                return Outcome(state="done", score=score, metrics=metrics, count=count, remarks=remarks, **fields)
            except KeyError as error:
                problem = f"no score: in status.json {error.args[0]}"
        problem = base.without_key(str(problem).strip().splitlines()[-1])
        return Outcome(state="failed", reasons=(f"{problem}; log: {ended.log}",), **fields)

    def _data(self) -> Path:
        """Where VLMEvalKit looks for its files."""
        if self.settings.data_root is not None:
            return self.settings.data_root.absolute() / "LMUData"
        home = os.environ.get("LMUData")  # noqa: SIM112 - VLMEvalKit's own name
        return Path(home) if home else Path.home() / "LMUData"

    def _environment(self, task: Task) -> dict[str, str | None]:
        values = base.offline_environment(self.settings)
        # In xlsx, the default, a missing package loses all answers after they were made.
        values |= {"LMUData": str(self._data()), "PRED_FORMAT": "tsv", "OPENAI_API_BASE": None, "LOCAL_LLM": None}
        if task.judge is None:
            return {**values, base.KEY: None}
        values[base.KEY] = os.environ.get(base.KEY) or "none"
        if self.settings.judge_url is not None:
            values["OPENAI_API_BASE"] = f"{self.settings.judge_url.rstrip('/')}/chat/completions"
        return values

    def _remarks(self, task: Task) -> tuple[str, ...]:
        """Whether the data are those that VLMEvalKit names."""
        digest = hashlib.md5(usedforsecurity=False)
        with open(self._data() / f"{task.name}.tsv", "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() == task.md5:
            return ()
        return (f"{task.name}.tsv is not the published file: its md5 is {digest.hexdigest()}, that is {task.md5}",)


def _task(benchmark: Benchmark) -> Task:
    assert benchmark.vlmevalkit is not None, benchmark.name
    return benchmark.vlmevalkit


def _status(out: Path, name: str) -> dict[str, Any] | None:
    """What the run wrote about the data set, or None."""
    for file in sorted(out.rglob("status.json"), reverse=True):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))["datasets"][name]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(found, dict):
            return found
    return None


def _count(file: Path) -> int | None:
    """Rows of a tab-separated file whose cells may hold line breaks."""
    import csv

    if not file.is_file():
        return None
    csv.field_size_limit(sys.maxsize)
    with open(file, encoding="utf-8", newline="") as stream:
        return sum(1 for _ in csv.reader(stream, delimiter="\t")) - 1
