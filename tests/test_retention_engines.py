"""The runner of benchmarks against a stand-in for lmms-eval that fails in every way the real one does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kore.errors import ArtifactError, ConfigError
from kore.retention.answering import Journal
from kore.retention.benchmarks import BENCHMARKS, select
from kore.retention.engines.base import Asked, Outcome, Settings
from kore.retention.engines.lmms_eval import LmmsEval
from kore.retention.engines.process import last_error
from kore.retention.engines.vlmevalkit import VlmEvalKit
from kore.retention.run import Retention, choose_engines, load_retention, plan, run_retention

STAND_IN = """
import json, os, sys, time
from pathlib import Path

def cli_evaluate():
    words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    task, out = words["--tasks"], Path(words["--output_path"])
    calls = Path(os.environ["STAND_IN_CALLS"])
    about = {"task": task, "cwd": os.getcwd(), "pid": os.getpid(), "arguments": sys.argv[1:]}
    about["environment"] = {k: v for k, v in os.environ.items() if k.startswith(("HF_", "OPENAI", "MODEL_VERSION"))}
    with open(calls, "a") as file:
        file.write(json.dumps(about) + "\\n")
    what = json.loads(os.environ["STAND_IN"])[task]
    if "say" in what:
        print(what["say"])
    if what.get("crash"):
        os.kill(os.getpid(), 9)
    if what.get("raise"):
        raise RuntimeError(what["raise"])
    if what.get("wait"):
        journal = dict(p.split("=") for p in words["--model_args"].split(","))["journal"]
        known = Path(journal).read_text() if Path(journal).exists() else ""
        if "first" not in known:
            with open(journal, "a") as file:
                file.write(json.dumps({"key": "first", "answer": "yes"}) + "\\n")
            time.sleep(600)
    if "results" in what:
        folder = out / "a__b"
        folder.mkdir(parents=True)
        counts = {"original": 4, "effective": what.get("asked", 4)}
        results = {"alias": task, **{f"{k},none": v for k, v in what["results"].items()}, "x_stderr,none": "N/A"}
        (folder / "20260101_000000_results.json").write_text(
            json.dumps({"results": {task: results}, "n-samples": {task: counts}}))
"""
MODULES = ["loguru", "sacrebleu", "evaluate", "pytz", "tenacity", "pytablewriter", "requests", "pandas", "Levenshtein"]
MODULES += ["dotenv", "openai"]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A folder with a package ``lmms_eval`` of version 9.9 and empty packages it would import."""
    folder = tmp_path_factory.mktemp("engine")
    files = {
        "lmms_eval/__init__.py": "",
        "lmms_eval/__main__.py": STAND_IN,
        "lmms_eval/api/__init__.py": "",
        "lmms_eval/api/model.py": "class lmms:\n    pass\n",
        "lmms_eval/models/__init__.py": "class _R:\n    def register_manifest(self, manifest, overwrite):\n"
        "        assert manifest.model_id == 'kore'\n\nMODEL_REGISTRY_V2 = _R()\n",
        "lmms_eval/models/registry_v2.py": "from dataclasses import dataclass\n\n@dataclass\nclass ModelManifest:\n"
        "    model_id: str\n    simple_class_path: str\n",
        "lmms_eval-9.9.dist-info/METADATA": "Metadata-Version: 2.1\nName: lmms_eval\nVersion: 9.9\n",
        **{f"{name}/__init__.py": "" for name in MODULES},
    }
    for one in BENCHMARKS:
        if one.lmms_eval is not None and one.name != "MMMU":
            files[f"lmms_eval/tasks/{one.key}/task.yaml"] = (
                f'include: common\ntask: "{one.lmms_eval.name}"\ntest_split: test\ndoc_to_text: !function utils.text\n'
            )
            files[f"lmms_eval/tasks/{one.key}/common"] = f"dataset_path: lab/{one.name}\n"
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def setting(stand_in, tmp_path, monkeypatch):
    """A model, data for all but ScienceQA, and an environment without keys; gives the calls the engine got."""
    monkeypatch.setenv("PYTHONPATH", str(stand_in))
    monkeypatch.setenv("STAND_IN_CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("HF_TOKEN_PATH", "/nowhere")
    for name in ("OPENAI_API_KEY", "MODEL_VERSION", "OPENAI_API_URL", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for one in BENCHMARKS:
        if one.name != "ScienceQA":
            (tmp_path / "data" / "lab" / one.name).mkdir(parents=True)
            (tmp_path / "data" / "lab" / one.name / "test.parquet").write_text("x")
    model = tmp_path / "model, the=first"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return tmp_path


def behave(monkeypatch, **tasks):
    monkeypatch.setenv("STAND_IN", json.dumps(tasks))


def calls(folder):
    file = folder / "calls"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def chosen(folder, names, **settings):
    given = Settings(data_root=folder / "data", **settings)
    return choose_engines(select(names.split(",")), LmmsEval(given), VlmEvalKit(given, None))


def run(folder, names, out="out", adapter=None, **settings):
    asked = Asked(str(folder / "model, the=first"), adapter)
    said = []
    found = run_retention(asked, folder / out, chosen(folder, names, **settings), say=lambda *one: said.append(one))
    return {one.name: one for one in found.outcomes}, found, said


POPE = {"results": {"pope_f1_score": 0.5, "pope_accuracy": 1.0}}
MME = {"results": {"mme_perception_score": 1000.0, "mme_cognition_score": 400.0}}


def test_scores_are_scaled_averaged_and_written(setting, monkeypatch):
    behave(monkeypatch, pope=POPE, mme=MME, scienceqa_img={})
    monkeypatch.setenv("OPENAI_API_KEY", "not for tasks without a judge")
    outcomes, found, said = run(setting, "pope,mme,scienceqa")
    assert outcomes["MME"].score == pytest.approx(50) and outcomes["POPE"].score == 50
    assert outcomes["POPE"].metrics == {"pope_f1_score": 0.5, "pope_accuracy": 1.0}
    assert (outcomes["POPE"].engine, outcomes["POPE"].version, outcomes["POPE"].count) == ("lmms-eval", "9.9", 4)
    assert outcomes["ScienceQA"].state == "missing"
    assert "lab/ScienceQA: expected at" in outcomes["ScienceQA"].reasons[0]
    assert found.kr == 50 and found.label == "K.R over 2 of 12 benchmarks" and not found.complete
    assert found.dimensions == {"COM": pytest.approx(50), "HAL": 50}
    assert found.missing["MMDU"] == "not asked for" and "ScienceQA" in found.missing
    assert load_retention(setting / "out") == found
    assert [(name, state) for name, state, _ in said] == [
        ("MME", "runs"), ("MME", "done"), ("ScienceQA", "skipped"), ("POPE", "runs"), ("POPE", "done"),
    ]  # fmt: skip
    (first, second) = calls(setting)
    assert first["cwd"] == str(setting / "data") and first["environment"]["HF_HUB_OFFLINE"] == "1"
    assert "OPENAI_API_KEY" not in second["environment"]
    given = dict(part.split("=") for part in first["arguments"][3].split(","))
    assert set(given) == {"pretrained", "dtype", "journal"}  # a path with a comma has not split them


FAULTS = {
    "nothing is written": ({}, "nothing said"),
    "no number": ({"results": {"pope_accuracy": 1.0}}, "pope_f1_score is not among pope_accuracy"),
    "not finite": ({"results": {"pope_f1_score": float("nan")}}, "pope_f1_score is nan"),
    "fewer questions": ({**POPE, "asked": 3}, "only 3 of 4 questions"),
    "an error that ends with 0": (
        {"say": "Traceback\n x\nValueError: odd\n Error during evaluation: odd model. Please set `-v` to get more"},
        r"odd model \(exit status 0\)",
    ),
    "an exception": ({"raise": "out of memory"}, r"RuntimeError: out of memory \(exit status 1\)"),
    "a crash": ({"crash": True}, "ended by SIGKILL"),
    "data": (
        {"say": "ConnectionError: Couldn't reach 'lab/POPE' on the Hub (OfflineModeIsEnabled)\nRetryError[x]"},
        "data set lab/POPE is neither below --data-root",
    ),
}


def test_every_failure_is_named_and_the_rest_goes_on(setting, monkeypatch):
    """Each fault under another name of the same task, all in one run; repaired, only they are run again."""
    names = [f"b{number}" for number in range(len(FAULTS))]
    pope, mme = select(["pope"])[0], select(["mme"])[0]
    faulty = [replace(pope, name=name, lmms_eval=replace(pope.lmms_eval, name=name)) for name in names]
    tasks = setting / "tasks"
    tasks.mkdir()
    for name in names:
        (tasks / f"{name}.yaml").write_text(f"task: {name}\ndataset_path: lab/POPE\n")
    engine = LmmsEval(Settings(data_root=setting / "data"), include=[tasks], benchmarks=[*faulty, mme])
    behave(monkeypatch, **{name: what for name, (what, _) in zip(names, FAULTS.values())}, mme=MME)
    asked, order = Asked(str(setting / "model, the=first")), [(one, engine) for one in [*faulty, mme]]
    found = run_retention(asked, setting / "out", order)
    for fault, (_, message), outcome in zip(FAULTS, FAULTS.values(), found.outcomes):
        assert outcome.state == "failed" and outcome.score is None, fault
        assert re.search(message, outcome.reasons[0]), outcome.reasons
        assert outcome.reasons[0].endswith(f"log: {setting}/out/benchmarks/{outcome.name}/log.txt")
    assert found.scores == {"MME": pytest.approx(50)}
    behave(monkeypatch, **dict.fromkeys(names[:2], POPE), mme={"crash": True})
    again = run_retention(asked, setting / "out", [*order[:2], order[-1]])
    assert again.scores == {"b0": 50, "b1": 50, "MME": pytest.approx(50)}
    assert [call["task"] for call in calls(setting)] == [*names, "mme", *names[:2]]


@pytest.mark.slow
def test_a_judge_is_never_asked_without_a_key_and_its_failures_are_no_score(setting, monkeypatch):
    behave(monkeypatch, mia_bench={"results": {"gpt_eval_score": 0.8}}, mathvista_testmini_format={})
    outcomes, _, _ = run(setting, "mia-bench")
    assert outcomes["MIA-Bench"].state == "missing" and not calls(setting)
    assert "set OPENAI_API_KEY" in outcomes["MIA-Bench"].reasons[0]
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    outcomes, _, _ = run(setting, "mia-bench", judge_model="judge-1", judge_url="http://127.0.0.1:1/v1/")
    assert outcomes["MIA-Bench"].score == 80 and outcomes["MIA-Bench"].judge == "judge-1"
    given = calls(setting)[0]["environment"]
    assert given["OPENAI_API_URL"] == "http://127.0.0.1:1/v1/chat/completions"
    assert given["OPENAI_API_KEY"] == "sk-secret" and given["MODEL_VERSION"] == "judge-1"
    failed = {"say": "Attempt 5 failed: key sk-secret is odd", "results": {"gpt_eval_score": 0.0}}
    behave(monkeypatch, mia_bench=failed, mathvista_testmini_format={"raise": "sk-secret refused"})
    outcomes, _, _ = run(setting, "mia-bench,mathvista", out="other", judge_url="http://127.0.0.1:1/v1/")
    assert "the judge failed 1 times" in outcomes["MIA-Bench"].reasons[0]
    assert calls(setting)[-1]["environment"]["OPENAI_API_URL"] == "http://127.0.0.1:1/v1"
    assert "sk-secret" not in (setting / "other" / "scores.json").read_text()
    assert "*** refused" in outcomes["MathVista"].reasons[0]


@pytest.mark.slow
def test_another_model_or_setting_starts_anew(setting, monkeypatch):
    behave(monkeypatch, pope=POPE)
    run(setting, "pope")
    folder = setting / "out" / "benchmarks" / "pope"
    (folder / "answers.jsonl").write_text('{"key": "a", "answer": "b"}\n')
    run(setting, "pope")
    assert len(calls(setting)) == 1 and (folder / "answers.jsonl").exists()
    run(setting, "pope", max_new_tokens=5)
    assert len(calls(setting)) == 2 and not (folder / "answers.jsonl").exists()
    adapter = setting / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    run(setting, "pope", adapter=adapter, max_new_tokens=5)
    (adapter / "adapter_config.json").write_text("{ }")
    _, found, _ = run(setting, "pope", adapter=adapter, max_new_tokens=5)
    assert len(calls(setting)) == 4 and found.adapter == str(adapter)


@pytest.mark.slow
def test_a_trial_is_called_one(setting, monkeypatch):
    behave(monkeypatch, pope={**POPE, "asked": 2})
    outcomes, found, _ = run(setting, "pope", limit=2)
    assert outcomes["POPE"].limited and outcomes["POPE"].count == 2
    assert found.label == "K.R over 1 of 12 benchmarks, a trial on a part of the questions"


def test_what_is_missing_is_said_without_running_anything(setting, monkeypatch):
    found = {one.benchmark.name: one.problems for one in plan(chosen(setting, "all"))}
    assert found["MME"] == found["POPE"] == ()
    assert "task mmmu_val: lmms-eval 9.9 has none" in found["MMMU"][0]
    assert f"hf download --repo-type dataset lab/ScienceQA --local-dir {setting}" in found["ScienceQA"][0]
    assert "pip install openpyxl" in found["MMBench"][0]
    assert "pip install --no-deps latex2sympy2 antlr4-python3-runtime==4.7.2" in found["MathVision"][0]
    assert found["OCRVQA"][0].startswith("VLMEvalKit: git clone") and "OCRVQA_TESTCORE.tsv" in found["OCRVQA"][1]
    assert len(found["MMDU"]) == 3 and not calls(setting)
    monkeypatch.setenv("PYTHONPATH", "")
    given = Settings()
    for python, message in ((sys.executable, "-m pip install lmms-eval"), ("/no/such/python", "cannot be started")):
        engine = LmmsEval(given, python)
        if python == sys.executable and engine.version() is not None:
            continue
        (only,) = plan([(select(["pope"])[0], engine)])
        assert message in only.problems[0]


def test_data_may_lie_in_the_hubs_cache_or_be_downloaded(setting, monkeypatch):
    pope = select(["pope"])[0]
    monkeypatch.setenv("HF_HOME", str(setting / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    engine = LmmsEval(Settings())
    assert "not in the hub's cache" in engine.problems(pope)[0]
    snapshot = setting / "home" / "hub" / "datasets--lab--POPE" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "test.parquet").write_text("x")
    assert engine.problems(pope) == []
    assert LmmsEval(Settings(hub=True)).problems(select(["mme"])[0]) == []


KILLED = """
import sys
from pathlib import Path
from kore.retention.engines.base import Asked, Settings
from kore.retention.engines.lmms_eval import LmmsEval
from kore.retention.benchmarks import select
from kore.retention.run import run_retention
root = Path(sys.argv[1])
engine = LmmsEval(Settings(data_root=root / "data"))
asked = Asked(str(root / "model, the=first"))
run_retention(asked, root / "out", [(one, engine) for one in select(["mme", "pope"])])
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="children end with their parent on Linux alone")
def test_a_killed_run_goes_on_and_leaves_no_process(setting, monkeypatch):
    behave(monkeypatch, mme=MME, pope={**POPE, "wait": True})
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{os.environ['PYTHONPATH']}:{root}"}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(setting)], env=environment)
    answers = setting / "out" / "benchmarks" / "pope" / "answers.jsonl"
    until = time.monotonic() + 60
    while not answers.exists() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "first" in answers.read_text()
    child = Path("/proc") / str(calls(setting)[-1]["pid"])
    while child.exists() and "Z" not in (child / "stat").read_text().split()[2] and time.monotonic() < until + 20:
        time.sleep(0.05)
    assert not child.exists() or "Z" in (child / "stat").read_text().split()[2]
    assert load_retention(setting / "out").scores == {"MME": pytest.approx(50)}
    outcomes, _, _ = run(setting, "mme,pope")
    assert outcomes["POPE"].score == 50 and "first" in answers.read_text()
    assert [call["task"] for call in calls(setting)] == ["mme", "pope", "pope"]


@pytest.mark.slow
def test_a_time_limit_ends_a_benchmark(setting, monkeypatch):
    behave(monkeypatch, pope={**POPE, "wait": True})
    outcomes, _, _ = run(setting, "pope", time_limit=3)
    assert "the time limit" in outcomes["POPE"].reasons[0]


def test_k_r_is_whole_with_twelve_scores():
    outcomes = [Outcome(one.name, one.dimension, "done", "x", "x", score=10.0 * i) for i, one in enumerate(BENCHMARKS)]
    whole = Retention("m", None, tuple(outcomes))
    assert whole.complete and whole.label == "K.R" and whole.kr == 55 and whole.missing == {}
    assert whole.dimensions["HAL"] == 105 and next(iter(whole.dimensions)) == "COM"
    assert not Retention("m", None, tuple(outcomes[1:])).complete


def test_a_benchmark_without_a_task_and_a_broken_result_are_named(setting):
    with pytest.raises(ConfigError, match="OCRVQA: lmms-eval has no task"):
        choose_engines(select(["ocrvqa"]), LmmsEval(Settings()), LmmsEval(Settings()))
    with pytest.raises(ArtifactError, match=r"scores\.json: no such file"):
        load_retention(setting)
    (setting / "scores.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"scores\.json: not written by kore retention"):
        load_retention(setting)


def test_the_line_that_says_what_went_wrong():
    log = "\x1b[31mTraceback (most recent call last):\x1b[0m\n  x\nkore.errors.DataError: a row\nsee above\r 10%|#\r"
    assert last_error(log) == "kore.errors.DataError: a row"
    assert last_error("one\ntwo\n") == "two" and last_error("") == ""


def test_a_journal_survives_a_torn_line(tmp_path):
    file = tmp_path / "a.jsonl"
    Journal(file).add([("k1", "pope 1", "yes\u2028no"), ("k2", "pope 2", "no")])
    file.write_bytes(file.read_bytes()[:-9])
    again = Journal(file)
    assert len(again) == 1 and again.get("k1") == "yes\u2028no" and again.get("k2") is None
    again.add([("k2", "pope 2", "no")])
    assert len(Journal(file)) == 2
