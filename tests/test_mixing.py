"""Adapters from some groups of a balanced capture and from mixtures of covariances, by commands and by runs."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from kore.adapter.parts import Parts
from kore.artifacts import load_tensors
from kore.cli.main import main
from kore.covariance import load_covariance, merge_covariance
from kore.errors import ArtifactError, ConfigError
from kore.mixing import open_mixture
from kore.pipeline.loading import load_config
from kore.pipeline.run import run_pipeline
from tests.tiny import save_tiny, tiny_conversations

FILES = ("adapter_config.json", "adapter_model.safetensors", "kore.json")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model, its old data in three files, their balanced covariance, and one of other data."""
    folder = tmp_path_factory.mktemp("mixing")
    save_tiny("llama", folder / "model")
    tiny_conversations(folder / "data", 6, text_only=True)
    rows = json.loads((folder / "data" / "conversations.json").read_text())
    for name, part in (("mme", rows[:2]), ("ocr", rows[2:3]), ("maths", rows[3:])):
        (folder / f"{name}.json").write_text(json.dumps(part))

    def capture(output, *names):
        data = [word for name in names for word in ("-d", f"{folder}/{name}.json")]
        assert main(["capture", "-m", f"{folder}/model", *data, "-o", f"{folder}/{output}", "--device", "cpu"]) == 0

    capture("a/cov", "mme", "ocr", "maths")
    capture("b/cov", "ocr")
    return folder


def init(work: Path, output: Path, *more: str) -> list[str]:
    words = ["init", "-m", f"{work}/model", "-o", str(output), "--device", "cpu", "--rank", "4", *more]
    return [f"{work}/{word}" if word in ("a/cov", "b/cov") else word for word in words]


def fails(capsys, words) -> str:
    capsys.readouterr()
    assert main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def info(path: Path) -> dict:
    return json.loads((path / "kore.json").read_text())


def test_a_capture_keeps_its_groups(work, tmp_path):
    from kore.covariance import group_folder

    parts = {name: load_covariance(group_folder(work / "a/cov", k)) for k, name in enumerate(("mme", "ocr", "maths"))}
    again, whole = merge_covariance(parts, "balanced"), load_covariance(work / "a/cov")
    for name in whole.modules:
        torch.testing.assert_close(again[name], whole[name], rtol=0, atol=0)
        torch.testing.assert_close(parts["ocr"][name], load_covariance(work / "b/cov")[name], rtol=1e-6, atol=1e-6)
    words = ["capture", "-m", f"{work}/model", "-d", f"{work}/mme.json", "-d", f"{work}/ocr.json", "--device", "cpu"]
    assert main([*words, "-o", f"{tmp_path}/c", "--set", "capture.keep_groups=false"]) == 0
    assert not (tmp_path / "c" / "groups").exists()
    with pytest.raises(ArtifactError, match=r"groups.000: group 'mme' is not kept; capture again"):
        open_mixture([tmp_path / "c"], ["mme"])


@pytest.mark.parametrize(
    ("words", "weights", "names"),
    [
        (["-c", "a/cov", "--group", "ocr"], [1.0], ["ocr"]),
        (["-c", "a/cov", "--group", "ocr", "--group", "mme"], "balanced", ["ocr", "mme"]),
        (["-c", "a/cov", "--set", "adapter.weights={mme: 3, ocr: 1}"], [3.0, 1.0], ["mme", "ocr"]),
        (["-c", "a/cov", "-c", "b/cov", "--weights", "1,2.5"], [1.0, 2.5], ["a/cov", "b/cov"]),
    ],
)
def test_the_adapter_is_that_of_the_mixture_and_says_so(work, tmp_path, words, weights, names):
    import kore

    assert main(init(work, tmp_path / "init", *words)) == 0
    merged_from = info(tmp_path / "init")["covariance"]["merged_from"]
    assert merged_from["weights"] == weights and [part["name"] for part in merged_from["sets"]] == names
    whole = load_covariance(work / "a/cov")
    groups = ("mme", "ocr", "maths")
    sets = {name: load_covariance(work / "a/cov/groups" / f"{k:03d}") for k, name in enumerate(groups)}
    sets |= {"a/cov": whole, "b/cov": load_covariance(work / "b/cov")}
    cov = merge_covariance([sets[name] for name in names], weights)
    found = load_tensors(tmp_path / "init" / "adapter_model.safetensors")
    for name in whole.modules:
        U = kore.null_space(cov[name], 4).basis
        A = found[f"base_model.model.{name}.lora_A.weight"].double()
        torch.testing.assert_close(A @ U @ U.mT, A, rtol=0, atol=1e-6)
        if names != ["a/cov", "b/cov"]:
            other = kore.null_space(whole[name], 4).basis
            assert (A @ other @ other.mT - A).norm() > 1e-3 * A.norm()


@pytest.mark.slow
def test_other_groups_and_weights_start_from_nothing_and_the_same_ones_are_skipped(work, tmp_path, capsys):
    def run(*words):
        capsys.readouterr()
        assert main(init(work, tmp_path / "init", "-c", "a/cov", *words)) == 0
        return capsys.readouterr().out, (tmp_path / "init" / "adapter_model.safetensors").read_bytes()

    one = run("--group", "mme", "--group", "ocr")
    assert "already done" in run("--group", "mme", "--group", "ocr")[0]
    said, weights = run("--group", "mme", "--group", "ocr", "--weights", "1,9")
    assert "again, " in said and weights != one[1]


def test_a_mixture_of_mixtures_says_what_is_in_it(work):
    mixed = open_mixture([work / "a/cov", work / "b/cov"], None, "balanced")
    first, second = mixed.merged_from["sets"]
    assert [part["name"] for part in first["merged_from"]["sets"]] == ["mme", "ocr", "maths"]
    assert "merged_from" not in second
    assert open_mixture([work / "b/cov"]).merged_from is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-c", "a/cov", "--group", "mmee"], "has no group 'mmee', it has mme, ocr, maths; did you mean mme?"),
        (["-c", "b/cov", "--group", "ocr"], "cov is one sum, not captured group by group"),
        (["-c", "a/cov", "-c", "b/cov", "--group", "ocr"], "expected one covariance whose groups they are, got 2"),
        (["-c", "a/cov", "-c", "a/cov"], "cov is given twice"),
        (["-c", "a/cov", "--group", "ocr", "--group", "ocr"], "groups: one is named twice"),
        (["-c", "a/cov", "-c", "b/cov", "--weights", "1"], "expected 2, one for each of a/cov, b/cov, got 1"),
        (["-c", "a/cov", "-c", "b/cov", "--weights", "1,x2"], "--weights: expected balanced or numbers"),
        (["-c", "a/cov", "-c", "b/cov", "--weights", "equal"], "adapter.weights: expected balanced, a list of numbers"),
        (["-c", "a/cov", "-c", "b/cov", "--weights=-1,2"], "expected numbers ≥ 0 that are not all 0, got [-1.0, 2.0]"),
        (["-c", "a/cov", "-c", "b/cov", "--weights", "0,0"], "expected numbers ≥ 0 that are not all 0"),
        (["-c", "a/cov", "--weights", "1,2"], "expected several covariances or groups to weigh, got one"),
        (["-c", "a/cov", "--group", "mme", "--set", "adapter.weights={ocr: 1}"], "got one"),
        (
            ["-c", "a/cov", "--group", "mme", "--group", "ocr", "--set", "adapter.weights={mme: 1, maths: 2}"],
            "'maths' is not one of mme, ocr",
        ),
        (["--method", "random-a", "--group", "mme"], "groups: method random-a reads no covariance"),
        (["--method", "lora-null-v1"], "--covariance: method lora-null-v1 needs the result of kore capture"),
        (["-c", "a/cov", "--set", "adapter.strength=2"], "strength: expected a number above 0 and up to 1, got 2"),
        (["-c", "a/cov", "--method", "lora-null-v2", "--set", "adapter.train_a=true"], "lora-null-v1 trains A"),
        (
            ["-c", "a/cov", "--set", "adapter.strength=0.5", "--set", "adapter.rank=energy:0.1"],
            "strength: at 0.5 A reads more",
        ),
    ],
)
def test_wrong_mixtures_are_one_line(work, tmp_path, capsys, words, message):
    assert message in fails(capsys, init(work, tmp_path / "init", *words))
    assert not (tmp_path / "init").exists()


def test_a_group_of_another_capture_makes_init_run_again(work, tmp_path):
    shutil.copytree(work / "a/cov", tmp_path / "cov")
    shutil.rmtree(tmp_path / "cov" / "groups" / "001")
    with pytest.raises(ArtifactError, match=r"001: group 'ocr' is not kept"):
        open_mixture([tmp_path / "cov"], ["ocr"])
    with pytest.raises(ConfigError, match="expected balanced or a number"):
        open_mixture([work / "a/cov", work / "b/cov"], None, "even")


def killed_after_one_input(words: list[str], threads: int) -> None:
    torch.set_num_threads(threads)
    write = Parts.write

    def write_and_die(self, *arguments):
        write(self, *arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    Parts.write = write_and_die
    main(words)


@pytest.mark.slow
def test_killed_with_every_option_it_ends_with_the_same_files(work, tmp_path, capsys):
    options = ["-c", "a/cov", "--group", "mme", "--group", "maths", "--weights", "2,1"]
    options += ["--set", "adapter.train_a=true", "--set", "adapter.strength=0.5"]
    words = init(work, tmp_path / "killed", *options)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process cannot use the threads of this one
    try:
        killed = multiprocessing.get_context("fork").Process(target=killed_after_one_input, args=(words, 1))
        killed.start()
        killed.join(timeout=120)
        assert killed.exitcode == -signal.SIGKILL
        assert len(list((tmp_path / "killed" / "checkpoint").glob("part-*"))) == 1
        assert main(words) == 0
        assert "goes on where it was stopped" in capsys.readouterr().out
        assert main(init(work, tmp_path / "whole", *options)) == 0
    finally:
        torch.set_num_threads(threads)
    for name in FILES:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    written = info(tmp_path / "whole")
    assert written["config"]["strength"] == 0.5 and written["config"]["train_a"] and not written["a_frozen"]


@pytest.mark.slow
def test_a_run_of_one_benchmark_with_a_trained_a(work, tmp_path):
    from peft import PeftModel

    from kore.adapter import load_adapter
    from kore.models import load_model

    config = {
        "output_dir": str(tmp_path / "run"),
        "model": {"path": str(work / "model"), "device": "cpu"},
        "old": {"files": [str(work / f"{name}.json") for name in ("mme", "ocr", "maths")]},
        "adapter": {"rank": 4, "groups": "mme", "train_a": True},
        "new": {"files": str(work / "data" / "conversations.json")},
        "train": {"max_steps": 2, "batch_size": 2, "learning_rate": 1e-2, "report_to": "none"},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    page = run_pipeline(load_config(tmp_path / "run.yaml"), lambda *words: None, progress=False).read_text()
    assert "KORE, A trained, null space of mme on model" in page
    assert "read the directions in which the covariance of mme is smallest when training, of A too, began" in page
    start, trained = info(tmp_path / "run" / "adapter-init"), info(tmp_path / "run" / "train" / "adapter")
    assert start["recipe"]["changed"]["adapter.groups"] == ["mme"] and start["recipe"]["changed"]["adapter.train_a"]
    for key in ("method", "config", "covariance", "null_spaces", "constant_halves", "rank"):
        assert trained[key] == start[key]
    assert trained["recipe"]["name"] == "default" and trained["covariance"]["merged_from"]["sets"][0]["name"] == "mme"
    ours = load_adapter(load_model(work / "model", device="cpu"), tmp_path / "run" / "train" / "adapter").eval()
    stock = PeftModel.from_pretrained(load_model(work / "model", device="cpu"), tmp_path / "run" / "train" / "adapter")
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(stock.eval()(ids).logits, ours(ids).logits, rtol=0, atol=1e-5)
    first = load_tensors(tmp_path / "run/adapter-init" / FILES[1])
    for name, tensor in load_tensors(tmp_path / "run/train/adapter" / FILES[1]).items():
        dim = 0 if ".lora_A." in name else 1
        moved, kept = (a != b for a, b in zip(tensor.split(4, dim), first[name].split(4, dim)))
        assert moved.any() and not kept.any(), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": ["mm"]}, r"adapter.groups: the old data has no group 'mm', it has mme, ocr; did you mean mme\?"),
        ({"weights": [1, 2]}, "adapter.weights: expected adapter.groups with it"),
        ({"groups": []}, "adapter.groups"),
    ],
)
def test_a_run_with_wrong_groups_is_refused_before_it_starts(work, tmp_path, changes, message):
    config = {
        "output_dir": str(tmp_path / "run"),
        "model": {"path": str(work / "model")},
        "old": {"files": [str(work / f"{name}.json") for name in ("mme", "ocr")]},
        "adapter": changes,
        "new": {"files": str(work / "data" / "conversations.json")},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "run.yaml")
    overrides = ["old.balance=false", "adapter.groups=[mme]", "adapter.weights=null"]
    with pytest.raises(ConfigError, match="expected old data of several groups"):
        load_config(tmp_path / "run.yaml", overrides)
