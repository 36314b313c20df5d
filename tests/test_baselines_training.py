"""Training by a baseline: however a step is split, stopped or shared, the result is the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kore.errors import ConfigError
from kore.training import train
from kore.training.trainer import KoreTrainer
from tests.processes import torchrun
from tests.tiny import save_tiny, tiny_conversations
from tests.training_worker import by_method, prepared

CONFIG = dict(
    batch_size=8,
    max_steps=4,
    logging_steps=1,
    save_steps=None,
    report_to=[],
    progress=False,
    max_grad_norm=0,
    optimizer="sgd",
    learning_rate=2.0,
    projector_learning_rate=0.2,
    warmup_ratio=0,
    scheduler="constant",
)
PENALTIES = {
    "ewc": ("ewc", {"strength": 300.0}),
    "ewc, weights": ("ewc", {"strength": 300.0, "over": "weights"}),
    "ewc-full": ("ewc-full", {"strength": 300.0, "samples": 3}),
    "lwf": ("lwf", {"strength": 3.0}),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("baselines")
    save_tiny("llava", root / "llava")
    tiny_conversations(root / "data", 8)
    tiny_conversations(root / "text", 5, text_only=True)
    return root


def run(root: Path, output: Path, method: str, options: dict, **changes):
    """A run's history and what it trained."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = {"ewc-full": "full"}.get(method, method)
        model, encoder = prepared("llava", root, start)
        data, penalty = by_method(model, encoder, root, method, options)
        result = train(model, encoder, data, {**CONFIG, **changes}, output, penalty=penalty)
    finally:
        torch.set_num_threads(threads)
    return result.history, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def differ(one, other) -> float:
    assert one.keys() == other.keys()
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


@pytest.fixture(scope="module")
def plain(root, tmp_path_factory):
    """What LoRA trains, without any penalty."""
    return run(root, tmp_path_factory.mktemp("plain"), "lora", {})


@pytest.mark.slow
@pytest.mark.parametrize("label", ["ewc, weights", "ewc-full", "lwf"])
def test_however_a_step_is_split_it_is_the_same(root, tmp_path, label, plain):
    """At a strength of 0 it is the method without the penalty, to the bit."""
    method, options = PENALTIES[label]
    full = method == "ewc-full"
    rate = {"learning_rate": 0.05, "projector_learning_rate": 0.05} if full else {}
    history, whole = run(root, tmp_path / "whole", method, options, **rate)
    other, split = run(root, tmp_path / "split", method, options, batch_size=2, gradient_accumulation=4, **rate)
    without, free = run(root, tmp_path / "free", method, {**options, "strength": 0.0}, **rate)
    if not full:
        assert [entry["loss"] for entry in without] == [entry["loss"] for entry in plain[0]]
        assert differ(free, plain[1]) == 0
    assert history[0]["penalty"] == 0 and history[-1]["penalty"] > 1e-4
    for one, two in zip(history, other, strict=True):
        for key in ("loss", "penalty"):
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-8)
    bound = differ(whole, free) / 30
    assert bound > 1e-5 and differ(whole, split) < bound


@pytest.mark.slow
@pytest.mark.parametrize(("method", "options"), [PENALTIES["ewc"], PENALTIES["lwf"]])
def test_a_stopped_run_ends_as_if_it_had_not_been(root, tmp_path, method, options, monkeypatch):
    config = dict(batch_size=4, epochs=2, max_steps=None, save_steps=1, optimizer="adamw_torch", learning_rate=5e-3)
    history, whole = run(root, tmp_path / "whole", method, options, **config)
    save = KoreTrainer._save_optimizer_and_scheduler

    def stop(self, output_dir):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        save(self, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(KoreTrainer, "_save_optimizer_and_scheduler", stop)
        with pytest.raises(KeyboardInterrupt):
            run(root, tmp_path / "cut", method, options, **config)
    assert (tmp_path / "cut" / "checkpoint-2").is_dir() and not (tmp_path / "cut" / "adapter").exists()
    resumed, trained = run(root, tmp_path / "cut", method, options, **config)
    assert resumed == history and len(history) == 4
    assert differ(trained, whole) == 0
    with pytest.raises(ConfigError, match="other penalty"):
        run(root, tmp_path / "cut", method, {**options, "strength": 1.0}, **config)


@pytest.mark.slow
@pytest.mark.parametrize("label", ["ewc", "lwf"])
def test_two_processes_agree_with_one(root, tmp_path, label):
    """Labels of the data: with the model's own, rounding may draw another one."""
    method, options = PENALTIES[label]
    options = {**options, "labels": "data"} if method == "ewc" else options
    halves = {**CONFIG, "batch_size": 2, "gradient_accumulation": 2}
    arguments = {"kind": "llava", "method": method, "options": options, "config": halves}
    done = torchrun("tests.training_worker", str(root), str(tmp_path / "two"), json.dumps(arguments))
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(tmp_path / "two" / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert differ(first, second) == 0
    history, one = run(root, tmp_path / "one", method, options)
    _, free = run(root, tmp_path / "free", method, {**options, "strength": 0.0})
    assert differ(one, first) < differ(one, free) / 30
    entries = json.loads((tmp_path / "two" / "history.json").read_text())
    assert len(entries) == len(history) == 4 and history[-1]["penalty"] > 1e-4
    for entry, wanted in zip(entries, history):
        assert entry["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        if method == "ewc":  # the distillation that a process logs is its own share
            assert entry["penalty"] == pytest.approx(wanted["penalty"], rel=1e-3, abs=1e-8)
