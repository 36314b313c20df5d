"""The command line: help, one clear line for every mistake, exit statuses, and kills."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from kore.cli import console, main
from kore.covariance import load_covariance, merge_covariance
from tests.tiny import save_tiny, tiny_conversations

COMMANDS = ["demo", "run", "augment", "capture", "init", "train", "merge", "convert", "eval", "analyze", "doctor"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model, data, and the results of capture and init."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny("llama", folder / "model")
    save_tiny("llama", folder / "other", seed=1)
    tiny_conversations(folder / "data", 6, text_only=True)
    tiny_conversations(folder / "pictures", 3)
    rows = [{"question_id": f"q{i}", "text": "Who?", "answer": "red", "type": "t"} for i in range(2)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = folder / "data" / "conversations.json"
    assert main(["capture", "-m", f"{folder}/model", "-d", str(data), "-o", f"{folder}/cov", "--device", "cpu"]) == 0
    init = ["init", "-m", f"{folder}/model", "-c", f"{folder}/cov", "--rank", "4", "-o", f"{folder}/init"]
    assert main([*init, "--device", "cpu"]) == 0
    return folder


def fails(capsys, words, status=2):
    """Run a command that must fail; returns its one line."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == status
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    assert "Traceback" not in captured.out + captured.err
    return lines[0]


def test_help_starts_fast_and_loads_nothing_heavy():
    code = "import sys; from kore.cli import main; main(sys.argv[1:]); print(sorted(sys.modules))"
    times = []
    for _ in range(2):
        started = time.perf_counter()
        shown = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
        times.append(time.perf_counter() - started)
    assert shown.returncode == 0 and "Usage" in shown.stdout
    loaded = set(re.findall(r"'([^']+)'", shown.stdout.splitlines()[-1]))
    assert not loaded & {"torch", "transformers", "peft", "pydantic", "matplotlib", "numpy", "triton", "datasets"}
    # 0.4 s when idle; the bound leaves room for a busy machine.
    assert min(times) < 3


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys):
    assert main([command, "--help"]) == 0
    assert re.search(rf"Example:\s+kore {command}", capsys.readouterr().out)


def test_version_and_unknown_words(capsys):
    from kore import __version__

    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out
    assert main(["nonsense"]) == 2
    assert main(["run", "x.yaml", "--nonsense"]) == 2


def test_capture_init_train_eval_merge(work, tmp_path, capsys):
    model, data = work / "model", work / "data" / "conversations.json"
    train = ["train", "-m", model, "-a", work / "init", "-d", data, "-o", tmp_path / "train", "--device", "cpu"]
    train += ["--batch-size", 2, "--set", "train.max_steps=2", "--set", "train.report_to=none"]
    assert main([str(word) for word in train]) == 0
    adapter = tmp_path / "train" / "adapter"
    ask = ["eval", "-m", model, "-a", adapter, "-q", work / "questions.jsonl", "-o", tmp_path / "eval"]
    capsys.readouterr()
    assert main([str(word) for word in [*ask, "--max-new-tokens", 2, "--device", "cpu"]]) == 0
    assert "CEM" in capsys.readouterr().out
    assert main(["merge", "-m", str(model), "-a", str(adapter), "-o", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "config.json").is_file()
    assert main([str(word) for word in train]) == 0
    assert "skipped" in capsys.readouterr().out


def test_capture_chooses_tokens_and_keeps_to_a_budget(work, tmp_path, capsys):
    capture = ["capture", "-m", f"{work}/model", "-d", f"{work}/data/conversations.json", "--device", "cpu"]
    assert main([*capture, "-o", f"{tmp_path}/all", "--tokens", "all", "--memory-budget", "4MiB"]) == 0
    assert "one pass" in capsys.readouterr().err
    assert main([*capture, "-o", f"{tmp_path}/answers", "--tokens", "answer", "--memory-budget", "1MiB"]) == 0
    assert "6 passes over the data" in capsys.readouterr().err
    prompt, everything, answers = (
        load_covariance(folder) for folder in (work / "cov", tmp_path / "all", tmp_path / "answers")
    )
    assert [cov.selection for cov in (prompt, everything, answers)] == ["prompt", "all", "answer"]
    name = prompt.modules[0]
    assert 0 < answers.tokens(name) < prompt.tokens(name) < everything.tokens(name)
    assert prompt.groups[0].modules == answers.groups[0].modules and not (tmp_path / "answers" / "checkpoint").exists()
    for line, words in (
        ("capture.memory_budget: expected a number of bytes", ["--memory-budget", "much"]),
        ("capture.tokens", ["--tokens", "none"]),
        ("alone needs", ["--memory-budget", "1KiB"]),
    ):
        assert line in fails(capsys, [*capture, "-o", tmp_path / "wrong", *words])


@pytest.mark.slow
def test_capture_balances_the_groups_of_old_data_and_goes_on_where_it_was_stopped(work, tmp_path, monkeypatch):
    import kore.capture

    rows = json.loads((work / "data" / "conversations.json").read_text())
    for name, part in (("first", rows[:1]), ("second", rows[1:3]), ("third", rows[3:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))

    def capture(output, names, *words):
        data = [word for name in names for word in ("-d", f"{tmp_path}/{name}.json")]
        command = ["capture", "-m", f"{work}/model", *data, "-o", f"{tmp_path}/{output}", "--device", "cpu"]
        assert main([*command, "--set", "capture.dtype=float64", *words]) == 0
        return load_covariance(tmp_path / output)

    first, second = capture("c1", ["first"]), capture("c2", ["second", "third"], "--set", "old.groups=[x, x]")
    everything, wanted = ["first", "second", "third"], merge_covariance([first, second], weights="balanced")
    plain = capture("plain", everything, "--set", "old.balance=false")
    calls, real = [], kore.capture.capture_covariance

    def stopped(*args, **kwargs):
        calls.append(kwargs["checkpoint"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(kore.capture, "capture_covariance", stopped)
    groups = ["--set", "old.groups=[a, b, b]"]
    with pytest.raises(AssertionError):
        capture("balanced", everything, *groups)
    balanced = capture("balanced", everything, *groups)
    assert [call.parent.name for call in calls] == ["000", "001", "001"]
    assert sorted(path.suffix for path in (tmp_path / "balanced").iterdir()) == ["", ".json"] + [".safetensors"] * 8
    assert [part["name"] for part in balanced.merged_from["sets"]] == ["a", "b"] and plain.merged_from is None
    for name in wanted.modules:
        torch.testing.assert_close(balanced[name], wanted[name], rtol=1e-12, atol=1e-12)
        assert (plain[name] - balanced[name]).norm() > 1e-3 * plain[name].norm()
        assert balanced.tokens(name) == plain.tokens(name)


def test_bad_input_is_one_line_and_status_2(work, tmp_path, capsys):
    model, data, out = work / "model", work / "data" / "conversations.json", tmp_path / "out"
    capture = ["capture", "-m", model, "-o", out, "-d"]
    init = ["init", "-m", model, "-o", out, "-c"]
    assert "old.files.0: no such file" in fails(capsys, [*capture, "gone.json"])
    assert "model.path: no such model directory" in fails(capsys, ["capture", "-m", "./gone", "-d", data, "-o", out])
    assert "unknown key capture.batch_siz" in fails(capsys, [*capture, data, "--set", "capture.batch_siz=3"])
    assert "no such configuration file" in fails(capsys, ["run", "gone.yaml"])
    assert re.search(r"rank.*(48|80)", fails(capsys, [*init, work / "cov", "--rank", 900]))
    assert "another model" in fails(capsys, ["init", "-m", work / "other", "-o", out, "-c", work / "cov"])
    assert "no such covariance directory" in fails(capsys, [*init, tmp_path / "gone", "--rank", 8])
    assert "method kore needs" in fails(capsys, ["init", "-m", model, "-o", out])
    assert "adapter.method: full has no adapter" in fails(capsys, ["init", "-m", model, "-o", out, "--method", "full"])
    assert "either --adapter" in fails(capsys, ["train", "-m", model, "-d", data, "-o", out])
    assert "no such adapter" in fails(capsys, ["train", "-m", model, "-a", tmp_path / "gone", "-d", data, "-o", out])
    assert "eval.new.0.file: no such file" in fails(capsys, ["eval", "-m", model, "-q", "gone.jsonl", "-o", out])


def test_broken_files_are_named(work, tmp_path, capsys):
    import shutil

    shutil.copytree(work / "cov", tmp_path / "cov")
    tensor = sorted((tmp_path / "cov").glob("*.safetensors"))[0]
    content = bytearray(tensor.read_bytes())
    content[-3] ^= 255
    tensor.write_bytes(content)
    init = ["init", "-m", work / "model", "-c", tmp_path / "cov", "--rank", 4, "-o", tmp_path / "init"]
    line = fails(capsys, init)
    assert tensor.name in line and "corrupt" in line
    tensor.write_bytes(content[:40])
    assert tensor.name in fails(capsys, init)
    shutil.copytree(work / "init", tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"nothing")
    ask = ["eval", "-m", work / "model", "-a", tmp_path / "adapter", "-q", work / "questions.jsonl"]
    assert "adapter_model.safetensors" in fails(capsys, [*ask, "-o", tmp_path / "eval"])


def test_bad_data_is_named_with_its_line(work, tmp_path, capsys):
    rows = json.loads((work / "pictures" / "conversations.json").read_text())
    (tmp_path / "text.png").write_text("not a picture")
    rows[1]["image"] = "text.png"
    (tmp_path / "rows.json").write_text(json.dumps(rows[1:2]))
    capture = ["capture", "-m", work / "model", "-o", tmp_path / "cov", "-d", tmp_path / "rows.json"]
    line = fails(capsys, [*capture, "--image-root", tmp_path])
    assert "rows.json:1" in line and "text.png" in line
    rows[1]["image"] = "gone.png"
    (tmp_path / "rows.json").write_text(json.dumps(rows[1:2]))
    assert "gone.png" in fails(capsys, [*capture, "--image-root", tmp_path])
    (tmp_path / "rows.jsonl").write_text('{"id": 1,\n')
    assert "rows.jsonl:1" in fails(capsys, [*capture[:-1], tmp_path / "rows.jsonl"])


def test_debug_shows_the_traceback_wherever_it_stands(capsys):
    for words in (["--debug", "run", "gone.yaml"], ["run", "gone.yaml", "--debug"]):
        assert main(words) == 2
        assert "Traceback" in capsys.readouterr().err


def test_unexpected_errors_and_interrupts(monkeypatch, capsys):
    import kore.doctor

    def broken():
        raise ZeroDivisionError("a bug\nwith details")

    monkeypatch.setattr(kore.doctor, "examine", broken)
    assert fails(capsys, ["doctor"], status=1) == "error: unexpected ZeroDivisionError: a bug; --debug shows where"

    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr(kore.doctor, "examine", stopped)
    assert "the same command goes on" in fails(capsys, ["doctor"], status=130)


def test_only_the_main_process_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["run", "gone.yaml"]) == 2
    console.say("hello")
    console.stage("train", "done", "fine")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_doctor(capsys, monkeypatch):
    import kore.doctor

    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for words in ("kernels native", "kernels triton", "torch", "GPU", "hub cache", "kore run can work here"):
        assert words in shown
    monkeypatch.setitem(kore.doctor.REQUIRED, "torch", "99")
    assert main(["doctor"]) == 1
    assert "too old; pip install 'torch>=99'" in capsys.readouterr().out


def test_doctor_names_a_backend_that_is_wrong_here(capsys, monkeypatch):
    from kore_kernels import selftest

    wrong = selftest.Result("native", "symmetrize", next(iter(selftest.ALLOWED)), 0.5)
    monkeypatch.setattr(selftest, "run", lambda: [wrong])
    assert main(["doctor"]) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "symmetrize in float32: error 5.0e-01" in output and "kernels test of native" in output


def run_config(work: Path, output: Path) -> Path:
    """A run long enough to be killed in every stage."""
    data = {"files": str(work / "data" / "conversations.json")}
    config = {
        "output_dir": str(output),
        "model": {"path": str(work / "model"), "device": "cpu"},
        "old": data,
        "capture": {"batch_size": 1, "checkpoint_every": 1},
        "adapter": {"rank": 4},
        "new": data,
        "train": {"max_steps": 12, "batch_size": 2, "save_steps": 2, "logging_steps": 1, "report_to": "none"},
    }
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return path


def kill_when(command: list[str], *signs: str) -> None:
    """Start the program and kill it as soon as a file like one of ``signs`` is there."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any(next(Path("/").glob(sign.lstrip("/")), None) for sign in signs):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"it ended before it could be killed: {process.communicate()[1]}")
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()


@pytest.mark.slow
def test_a_run_killed_in_every_stage_ends_with_the_same_result(work, tmp_path, capsys):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "kore", "run", str(run_config(work, killed))]
    kill_when(command, f"{killed}/covariance/checkpoint*/manifest.json", f"{killed}/covariance/manifest.json")
    kill_when(command, f"{killed}/.kore/adapter-init.json")
    kill_when(command, f"{killed}/train/checkpoint-4")
    capsys.readouterr()
    assert main(["run", str(run_config(work, killed))]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"capture +skipped", shown) and "goes on where it was stopped" in shown
    assert main(["run", str(run_config(work, whole))]) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (killed / "train" / "adapter" / name).read_bytes() == (whole / "train" / "adapter" / name).read_bytes()
    for file in sorted((whole / "covariance").glob("*.safetensors")):
        assert file.read_bytes() == (killed / "covariance" / file.name).read_bytes()


@pytest.mark.slow
def test_two_training_processes_from_a_run(work, tmp_path, capfd):
    words = ["train.processes=2", "train.max_steps=2", "train.save_steps=null", "capture.batch_size=6"]
    status = main(["run", str(run_config(work, tmp_path / "run")), *words])
    shown = capfd.readouterr()
    assert status == 0, shown.err
    assert (tmp_path / "run" / "train" / "adapter" / "adapter_model.safetensors").is_file()
    assert json.loads((tmp_path / "run" / "train" / "run.json").read_text())["processes"] == 2
    assert shown.out.count("✓ train ") == 2  # the main training process, and the run that started it
