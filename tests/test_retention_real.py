"""The runner with the real engines, a small model and local data whose scores are known beforehand.

Engines have environments of their own, so their interpreters are named: KORE_LMMS_PYTHON for lmms-eval,
KORE_VLMEVALKIT (a checkout) and KORE_VLMEVALKIT_PYTHON for VLMEvalKit.
"""

from __future__ import annotations

import base64
import csv
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from kore.data.types import Message
from kore.retention.answering import Answerer, Prompt
from kore.retention.benchmarks import Benchmark, Task, select
from kore.retention.engines.base import Asked, Settings
from kore.retention.engines.lmms_eval import LmmsEval
from kore.retention.engines.vlmevalkit import VlmEvalKit
from kore.retention.run import run_retention
from tests.tiny import save_tiny, tiny_conversations, tiny_llava

LMMS = os.environ.get("KORE_LMMS_PYTHON") or (sys.executable if importlib.util.find_spec("lmms_eval") else None)
CHECKOUT, VLM = os.environ.get("KORE_VLMEVALKIT"), os.environ.get("KORE_VLMEVALKIT_PYTHON")
needs_lmms = pytest.mark.skipif(
    LMMS is None, reason="lmms-eval is not installed; KORE_LMMS_PYTHON names its interpreter"
)
needs_vlm = pytest.mark.skipif(CHECKOUT is None, reason="KORE_VLMEVALKIT names no checkout of VLMEvalKit")

TASK = """
task: kore_local
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
process_results: !function utils.results
generation_kwargs: {max_new_tokens: 6, temperature: 0, do_sample: false}
metric_list:
  - {metric: same, aggregation: mean, higher_is_better: true}
"""
UTILS = """
from PIL import Image

def visual(doc):
    return [Image.open(path) for path in doc["images"]]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def results(doc, answers):
    return {"same": float(answers[0] == doc["answer"])}
"""


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A tiny LLaVA in a folder with a comma, an adapter that changes its answers, and pictures."""
    from peft import LoraConfig, get_peft_model

    from kore.models import language_model_linears

    folder = tmp_path_factory.mktemp("real")
    tiny_conversations(folder, 4)
    model = save_tiny("llava", folder / "tiny, llava=1")
    base = tiny_llava(0)
    names = language_model_linears(base)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=names, init_lora_weights=False))
    adapted.save_pretrained(folder / "adapter")
    return folder, model, folder / "adapter", sorted((folder / "images").glob("*.png"))


def answers(model, adapter, asked, limit=6):
    """What the model says to (text, images), asked one by one."""
    answerer = Answerer(str(model), None if adapter is None else str(adapter), device="cpu")
    prompts = [
        Prompt(str(i), (Message("user", text),), lambda p=paths: p, limit) for i, (text, paths) in enumerate(asked)
    ]
    return [next(answerer.answer([prompt]))[0] for prompt in prompts]


def made_true(said):
    """Right answers for the first half and wrong ones for the rest: the score is 50."""
    return [one if i < len(said) / 2 else f"not {one}" for i, one in enumerate(said)]


@pytest.mark.slow
@needs_lmms
def test_lmms_eval_scores_a_local_task_with_an_adapter(setting, tmp_path):
    """Rows with one image, two and none; the score counts the adapter's own answers, which the base does not give."""
    _, model, adapter, images = setting
    asked = [("What is the colour of the square?", [images[i % 4]]) for i in range(3)]
    asked += [("Describe the image in one sentence.", images[:2]), ("Compare <image> and <image>.", images[1:3])]
    asked += [("Who founded the city of Arven, and in which year?", [])] * 2 + [("Who?", [images[0]])]
    said = answers(model, adapter, asked)
    assert said != answers(model, None, asked) and len(set(said)) > 2
    rows = [
        {"question": text, "images": list(map(str, paths)), "answer": answer}
        for (text, paths), answer in zip(asked, made_true(said))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "local.yaml").write_text(TASK.replace("FILE", str(tmp_path / "rows.jsonl")))
    (tasks / "utils.py").write_text(UTILS)
    local = Benchmark("Local", "COM", Task("kore_local", ("same",), 100))
    engine = LmmsEval(Settings(batch_size=3), LMMS, [tasks], [local])
    assert engine.problems(local) == []
    found = run_retention(Asked(str(model), adapter, device="cpu"), tmp_path / "out", [(local, engine)])
    (outcome,) = found.outcomes
    assert outcome.score == 50, outcome
    assert outcome.count == 8 and outcome.version
    kept = [json.loads(line) for line in (tmp_path / "out/benchmarks/local/answers.jsonl").read_text().splitlines()]
    assert {one["name"]: one["answer"] for one in kept} == {f"kore_local {i}": one for i, one in enumerate(said)}


@pytest.mark.slow
@needs_lmms
def test_lmms_eval_reads_the_published_layout_and_says_what_is_broken(setting, tmp_path):
    """POPE as lmms-eval ships it, on rows of our own; MME has a file without its split."""
    pytest.importorskip("pandas")
    from datasets import Dataset, Image

    _, model, _, images = setting
    pope, mme = select(["pope", "mme"])[::-1]
    engine = LmmsEval(Settings(data_root=tmp_path), LMMS, benchmarks=[pope, mme])
    places = {name: tmp_path / engine._found["tasks"][name]["data"] / "data" for name in ("pope", "mme")}
    for place in places.values():
        place.mkdir(parents=True)
    columns = {name: ["1", "2"] for name in ("id", "question_id", "image_source")}
    columns |= {"question": ["Is there a square?"] * 2, "answer": ["yes", "no"], "category": ["random"] * 2}
    rows = Dataset.from_dict({**columns, "image": [str(one) for one in images[:2]]}).cast_column("image", Image())
    rows.to_parquet(places["pope"] / "test-00000-of-00001.parquet")
    (places["mme"] / "readme.txt").write_text("no data")
    found = run_retention(Asked(str(model), device="cpu"), tmp_path / "out", [(one, engine) for one in (mme, pope)])
    broken, whole = found.outcomes
    assert broken.state == "failed" and "has no split 'test'" in broken.reasons[0], broken.reasons
    assert whole.state == "done" and whole.count == 2, whole
    assert {"pope_accuracy", "pope_f1_score", "pope_precision", "pope_recall"} <= set(whole.metrics)
    assert found.label == "K.R over 1 of 12 benchmarks" and whole.score == 100 * whole.metrics["pope_f1_score"]


@pytest.mark.slow
@needs_vlm
def test_vlmevalkit_scores_ocrvqa(setting, tmp_path):
    """Its own data set class on a file of ours: the answers it adds a line to are the model's, so half are right."""
    _, model, adapter, images = setting
    question = "What is the colour of the square?"
    text = f"<image>\n{question}\nAnswer the question using a single word or phrase."
    said = answers(model, adapter, [(text, [image]) for image in images], limit=4)
    (tmp_path / "LMUData").mkdir()
    with open(tmp_path / "LMUData" / "OCRVQA_TESTCORE.tsv", "w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "image", "question", "answer"])
        for number, (image, answer) in enumerate(zip(images, made_true(said))):
            table.writerow([number, base64.b64encode(image.read_bytes()).decode(), question, repr([answer])])
    (ocrvqa,) = select(["ocrvqa"])
    engine = VlmEvalKit(Settings(data_root=tmp_path, max_new_tokens=4), Path(CHECKOUT), VLM)
    assert engine.problems(ocrvqa) == []
    found = run_retention(Asked(str(model), adapter, device="cpu"), tmp_path / "out", [(ocrvqa, engine)])
    (outcome,) = found.outcomes
    assert outcome.score == 50, outcome
    assert outcome.count == 4 and "is not the published file" in outcome.remarks[0]
    assert outcome.engine == "vlmevalkit"
