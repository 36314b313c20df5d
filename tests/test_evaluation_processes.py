"""An evaluation shared by several processes: killed, gone on with another number of them, and one that fails."""

from __future__ import annotations

import json
import signal

import pytest
import torch

from kore.data import Encoder
from kore.evaluation import evaluate, load_result
from kore.models import load_model
from tests.evaluation_worker import questions, work
from tests.processes import run_processes, torchrun
from tests.tiny import save_tiny, tiny_conversations

pytestmark = pytest.mark.slow

FILES = ("answers.jsonl", "scores.json", "state.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, pictures, and the result of one process."""
    folder = tmp_path_factory.mktemp("shared")
    save_tiny("llava", folder / "model")
    tiny_conversations(folder, 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, encoder = load_model(folder / "model", device="cpu"), Encoder.from_pretrained(folder / "model")
    asked = questions(folder / "images")
    evaluate(model, encoder, asked, batch_size=2, max_new_tokens=3, output=folder / "one", progress=False)
    torch.set_num_threads(threads)
    return folder


def launch(folder, output, count, dies_after=None, case=""):
    """How the processes ended, and what each says it has done."""
    store = folder / f"store-{output}-{count}-{dies_after}"
    ended = run_processes(work, [(rank, count, store, folder, output, dies_after, case) for rank in range(count)])
    files = [folder / f"{output}-{rank}.json" for rank in range(count)]
    return ended, [json.loads(file.read_text()) for file in files if file.is_file()]


def same(folder, output):
    for name in FILES:
        assert (folder / output / name).read_bytes() == (folder / "one" / name).read_bytes(), name
    assert sorted(path.name for path in (folder / output).iterdir()) == sorted(FILES)


def test_two_processes_give_the_files_of_one(folder):
    ended, said = launch(folder, "two", 2)
    assert ended == [0, 0]
    same(folder, "two")
    first, second = (each["asked"] for each in said)
    assert set(first).isdisjoint(second) and len(first) + len(second) == 11 and min(len(first), len(second)) >= 5
    expected = [answer.prediction for answer in load_result(folder / "one").answers]
    assert said[0]["answers"] == said[1]["answers"] == expected and len(set(expected)) > 1


def test_killed_in_two_processes_it_goes_on_in_three_and_asks_nothing_twice(folder):
    ended, said = launch(folder, "killed", 2, dies_after=1)
    assert ended == [-signal.SIGKILL] * 2 and not said and not (folder / "killed" / "scores.json").exists()
    kept = sum(len(file.read_text().splitlines()) for file in (folder / "killed").glob("answers*.jsonl"))
    assert kept == 4 and (folder / "killed" / "answers.1.jsonl").is_file()
    ended, said = launch(folder, "killed", 3)
    assert ended == [0, 0, 0]
    same(folder, "killed")
    asked = [one for each in said for one in each["asked"]]
    assert len(asked) == len(set(asked)) == 11 - kept


@pytest.mark.parametrize(
    ("case", "first", "second"),
    [
        ("bad image", "process 1 of the evaluation failed: no such picture", "no such picture"),
        ("another model", "have different models", "have different models"),
    ],
)
def test_a_failure_in_one_process_ends_all(folder, case, first, second):
    ended, said = launch(folder, case.replace(" ", "-"), 2, case=case)
    assert ended == [0, 0]
    assert first in said[0]["error"] and second in said[1]["error"]


def test_the_command_in_two_processes(folder, tmp_path):
    rows = [
        {"question_id": q.question_id, "text": q.text, "answer": q.answer, "type": q.type}
        | ({"image": q.image.name} if q.image else {})
        for q in questions(folder / "images")
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["-m", f"{folder}/model", "-q", f"{tmp_path}/q.jsonl", "--image-root", f"{folder}/images"]
    words += ["--batch-size", "2", "--max-new-tokens", "3", "--device", "cpu"]
    ended = torchrun("kore", "eval", *words, "-o", f"{tmp_path}/eval")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("11 questions") == 1 and ended.stdout.count("result: ") == 1
    assert "K.A " in ended.stdout and (tmp_path / "eval" / "report.html").is_file()
    answers = [answer.prediction for answer in load_result(tmp_path / "eval" / "new" / "q").answers]
    assert answers == [answer.prediction for answer in load_result(folder / "one").answers]
