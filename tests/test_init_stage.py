"""``kore init``: killed and started again, and with a rank for each layer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from kore.adapter import load_adapter
from kore.analysis import leak
from kore.cli.main import main
from kore.covariance import load_covariance
from kore.models import load_model
from kore.pipeline.loading import load_config
from kore.pipeline.run import run_pipeline
from tests.tiny import save_tiny, tiny_conversations

FILES = ("adapter_config.json", "adapter_model.safetensors", "kore.json")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("init")
    save_tiny("llama", folder / "model")
    tiny_conversations(folder / "data", 6, text_only=True)
    data = folder / "data" / "conversations.json"
    assert main(["capture", "-m", f"{folder}/model", "-d", str(data), "-o", f"{folder}/cov", "--device", "cpu"]) == 0
    return folder


def init(work: Path, output: Path, *more: str) -> list[str]:
    return ["init", "-m", f"{work}/model", "-c", f"{work}/cov", "-o", str(output), "--device", "cpu", *more]


@pytest.mark.slow
def test_killed_after_every_input_it_ends_with_the_same_files(work, tmp_path, capsys):
    script = """
        import os, signal, sys, torch
        from kore.adapter.parts import Parts
        from kore.cli.main import main
        torch.set_num_threads(int(sys.argv[1]))
        write = Parts.write
        def write_and_die(self, *arguments):
            write(self, *arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        Parts.write = write_and_die
        main(sys.argv[2:])
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-c", textwrap.dedent(script), str(torch.get_num_threads())]
    for finished in (1, 2):
        done = subprocess.run([*command, *init(work, killed, "--rank", "4")], env=environment, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert len(list((killed / "checkpoint").glob("part-*"))) == finished
    capsys.readouterr()
    assert main(init(work, killed, "--rank", "4")) == 0
    assert "goes on where it was stopped" in capsys.readouterr().out
    assert main(init(work, whole, "--rank", "4")) == 0
    for name in FILES:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert {file.name for file in killed.iterdir()} == {file.name for file in whole.iterdir()} >= set(FILES)
    assert not (killed / "checkpoint").exists()


@pytest.mark.slow
def test_another_rank_does_not_go_on_from_what_is_there(work, tmp_path):
    assert main(init(work, tmp_path / "init", "--rank", "4")) == 0
    (tmp_path / "init" / "checkpoint" / "part-00000").mkdir(parents=True)
    (tmp_path / "init" / "checkpoint" / "part-00000" / "manifest.json").write_text("{}")  # an error, were it read
    assert main(init(work, tmp_path / "init", "--rank", "5")) == 0
    assert json.loads((tmp_path / "init" / "kore.json").read_text())["rank"] == 5


def test_a_rank_for_each_layer(work, tmp_path, capsys):
    assert main(init(work, tmp_path / "init", "--rank", "energy:0.01")) == 0
    model = load_adapter(load_model(work / "model", device="cpu"), tmp_path / "init")
    shares = leak(model, load_covariance(work / "cov"))
    assert all(share < 0.01 for share in shares.values()) and len(set(model.kore_info["rank"].values())) > 1
    capsys.readouterr()
    assert main(init(work, tmp_path / "other", "--rank", "energy:0.01", "--method", "random-a")) == 2
    assert "'energy:0.01' needs a covariance" in capsys.readouterr().err
    assert main(init(work, tmp_path / "other", "--rank", "energy:1")) == 2
    assert "energy:τ with 0 < τ < 1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_with_a_rank_for_each_layer(work, tmp_path):
    data = {"files": str(work / "data" / "conversations.json")}
    config = {
        "output_dir": str(tmp_path / "run"),
        "model": {"path": str(work / "model"), "device": "cpu"},
        "old": data,
        "adapter": {"rank": "energy:0.02"},
        "new": data,
        "train": {"max_steps": 1, "batch_size": 2, "report_to": "none"},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    report = run_pipeline(load_config(tmp_path / "run.yaml"), lambda *words: None, progress=False)
    assert "in every layer; in some it reads more" in report.read_text(encoding="utf-8")
