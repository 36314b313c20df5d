"""MoELoRA, O-LoRA, SEFE and CIA in training and in ``kore run``, and the budget of all methods."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from kore.artifacts import read_json
from kore.baselines import BASELINES, METHODS, NULL_SPACE, baseline_of, prepare_model
from kore.capture import capture_covariance
from kore.cli.main import main
from kore.errors import ConfigError
from kore.pipeline.launch import train_command
from kore.pipeline.loading import load_config
from kore.pipeline.run import build_stages, run_pipeline, stage_names
from kore.training import train
from kore.training.trainer import KoreTrainer
from tests.batches import MODELS, make_batches
from tests.processes import torchrun
from tests.test_baselines_pipeline import BRIEF, write
from tests.test_baselines_training import CONFIG, differ
from tests.test_pipeline import Said, adapter_gives_the_trained_logits
from tests.tiny import save_tiny, tiny_conversations
from tests.training_worker import by_method, prepared

SLOW = pytest.mark.slow
QUICK = {
    "o-lora": {"previous": "weights", "strength": 30.0},
    "sefe": {"previous": "weights", "strength": 300.0},
    "cia": {"beta": 0.5},
    "moelora": {"balance": 0.5, "contrastive": 0.5},
}
FREE = {
    "o-lora": {"previous": "none"},
    "sefe": {"reglora": False},
    "cia": {"rule": "constant", "beta": 0},
    "moelora": {"balance": 0, "contrastive": 0},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("methods")
    save_tiny("llava", root / "llava")
    tiny_conversations(root / "data", 8)
    tiny_conversations(root / "text", 8, text_only=True)
    return root


def run(root, output, method, options, **changes):
    """A run's history and what it trained."""
    model, encoder = prepared("llava", root, method, options=options)
    data, penalty = by_method(model, encoder, root, method, options)
    result = train(model, encoder, data, {**CONFIG, **changes}, output, penalty=penalty)
    return result.history, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["llava", "qwen_vl"])
def test_all_methods_train_as_many_parameters(kind):
    cov = capture_covariance(MODELS[kind](), make_batches(kind, 2))
    adapters = [method for method in METHODS if not BASELINES[method].in_full]
    counts = {}
    for method in adapters:
        matched = not (BASELINES[method]().trains_a if hasattr(BASELINES[method], "trains_a") else True)
        rank = "match-lora-16" if matched else 16
        model = prepare_model(MODELS[kind](), method, cov if method in NULL_SPACE else None, rank=rank, progress=False)
        counts[method] = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and ".lora_" in n)
        if model.kore_info.get("constant_halves"):
            counts[method] //= 2
        projector = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n)
        assert projector == sum(p.numel() for n, p in model.named_parameters() if ".modules_to_save." in n) > 0
    assert {"moelora", "o-lora", "sefe", "cia", "replay", "ewc", "lwf", "kore"} < counts.keys()
    for method, count in counts.items():
        assert 0.97 < count / counts["lora"] <= 1, method


@pytest.mark.slow
@pytest.mark.parametrize("method", ["moelora", "o-lora", "sefe", "cia"])
def test_however_a_step_is_split_it_is_the_same(root, tmp_path, method):
    steps = {"max_steps": 2 if method == "moelora" else 4}
    history, whole = run(root, tmp_path / "whole", method, QUICK[method], **steps)
    split = {"batch_size": 2, "gradient_accumulation": 4, **steps}
    if method == "moelora":
        split["gradient_checkpointing"] = True
    other, parts = run(root, tmp_path / "split", method, QUICK[method], **split)
    _, free = run(root, tmp_path / "free", method, {**QUICK[method], **FREE[method]}, **steps)
    assert (history[-1]["penalty"] > 1e-3) == (method != "cia")
    for one, two in zip(history, other, strict=True):
        for key in ("loss", "penalty"):
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6)
    bound = differ(whole, free) / 30
    assert bound > 1e-5 and differ(whole, parts) < bound


@pytest.mark.slow
@pytest.mark.parametrize("method", QUICK)
def test_a_stopped_run_ends_as_if_it_had_not_been(root, tmp_path, method, monkeypatch):
    """Stopped at step 3 of each training that it does: for two methods first that of the adapter on old data."""
    options = {"previous": "adapter", "previous_steps": 4} if method in ("o-lora", "sefe") else {}
    options = {**QUICK[method], **options}
    config = dict(batch_size=4, epochs=2, max_steps=None, save_steps=1, optimizer="adamw_torch", learning_rate=5e-3)
    history, whole = run(root, tmp_path / "whole", method, options, **config)
    save, stopped = KoreTrainer._save_optimizer_and_scheduler, []

    def stop(self, output_dir):
        if self.state.global_step == 3 and str(self.args.output_dir) not in stopped:
            stopped.append(str(self.args.output_dir))
            raise KeyboardInterrupt
        save(self, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(KoreTrainer, "_save_optimizer_and_scheduler", stop)
        for _ in range(1 + ("previous_steps" in options)):
            with pytest.raises(KeyboardInterrupt):
                run(root, tmp_path / "cut", method, options, **config)
    folders = [str(tmp_path / "cut" / "penalty" / "previous"), str(tmp_path / "cut")]
    assert stopped == folders[-len(stopped) :] and len(stopped) == 1 + ("previous_steps" in options)
    resumed, trained = run(root, tmp_path / "cut", method, options, **config)
    assert resumed == history and len(history) == 4
    assert differ(trained, whole) == 0
    if "previous_steps" in options:
        with pytest.raises(ConfigError, match="other penalty"):
            run(root, tmp_path / "cut", method, {**options, "previous_steps": 5}, **config)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["moelora", "o-lora", "cia"])
def test_two_processes_agree_with_one(root, tmp_path, method):
    options = {**QUICK[method], **({"previous": "adapter", "previous_steps": 2} if method == "o-lora" else {})}
    halves = {**CONFIG, "batch_size": 2, "gradient_accumulation": 2}
    arguments = {"kind": "llava", "method": method, "options": options, "config": halves}
    done = torchrun("tests.training_worker", str(root), str(tmp_path / "two"), json.dumps(arguments))
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(tmp_path / "two" / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert differ(first, second) == 0
    _, one = run(root, tmp_path / "one", method, options)
    _, free = run(root, tmp_path / "free", method, {**options, **FREE[method]})
    assert differ(one, first) < differ(one, free) / 20


def end_to_end(tmp_path, kind, method, options, rank=4, asks=BRIEF):
    path = write(tmp_path, kind, method, options, **asks)
    config = load_config(path, [f"adapter.rank={rank}"])
    said = Said()
    report = run_pipeline(config, said, progress=False)
    assert f"{BASELINES[method].title} on model" in report.read_text(encoding="utf-8")
    adapter = tmp_path / "run" / "train" / "adapter"
    info = read_json(adapter / "kore.json")
    assert info["method"] == method and options.items() <= info["options"].items()
    assert baseline_of(adapter).options.model_dump(mode="json") == info["options"]
    history = read_json(tmp_path / "run" / "train" / "history.json")
    assert len(history) == 3
    said.clear()
    run_pipeline(config, said, progress=False)
    assert {state for _, state, _ in said} == {"skipped"}
    return config, history


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llava", "qwen_vl"])
@pytest.mark.parametrize("method", ["o-lora", "sefe", "cia"])
def test_from_yaml_to_report(kind, method, tmp_path):
    options = {
        "o-lora": {"previous_steps": 2},
        "sefe": {"previous_steps": 2, "share": 0.5},
        "cia": {"rule": "official"},
    }
    config, history = end_to_end(tmp_path, kind, method, options[method])
    assert "capture" not in stage_names(config)
    key = {"o-lora": "old_overlap", "sefe": "key_elements", "cia": "adaptive_beta"}[method]
    assert key in history[-1] and (history[-1]["penalty"] > 0) == (method != "cia")
    previous = tmp_path / "run" / "train" / "penalty" / "previous" / "adapter" / "kore.json"
    assert previous.is_file() == (method != "cia")
    if method == "sefe":
        counts = read_json(tmp_path / "run" / "train" / "adapter" / "kore.json")["answer_styles"]
        assert counts["conversations"] == sum(counts["before"].values()) == 6
        assert sum(counts["changed_into"].values()) == 3 and len(counts["changed_into"]) == 3
    if method != "cia":
        assert read_json(previous)["method"] == "lora" and "options" not in read_json(previous)
    assert adapter_gives_the_trained_logits(tmp_path, kind) or method == "cia"


@pytest.mark.parametrize("kind", [pytest.param("llava", marks=SLOW), "qwen_vl"])
def test_routed_experts_are_trained_and_asked_and_not_merged(kind, tmp_path, capsys):
    _, history = end_to_end(tmp_path, kind, "moelora", {"preset": "luo"}, rank=18, asks={})
    assert history[-1]["expert_balance"] > 0.5 and history[-1]["penalty"] > 0
    scores = read_json(tmp_path / "run" / "eval" / "after" / "scores.json")
    assert scores["new"]["fresh"]["overall"]["count"] == 3
    adapter = tmp_path / "run" / "train" / "adapter"
    assert main(["merge", "-m", f"{tmp_path}/model", "-a", f"{adapter}", "-o", f"{tmp_path}/merged"]) == 2
    assert "cannot be merged" in " ".join(capsys.readouterr().err.split())
    for folder in (tmp_path / "run" / "train").glob("checkpoint-*"):
        assert read_json(folder / "adapter_config.json")["peft_type"] == "KORE_ROUTED_LORA"


@pytest.mark.slow
def test_o_lora_may_hold_the_covariance(tmp_path):
    path = write(tmp_path, "llama", "o-lora", {"previous": "covariance"}, **BRIEF)
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(values))
    config = load_config(path)
    assert stage_names(config) == ["capture", "init", "train", "report"]
    run_pipeline(config, Said(), progress=False)
    history = read_json(tmp_path / "run" / "train" / "history.json")
    assert history[-1]["old_overlap"] > 0
    stage = next(one for one in build_stages(config) if one.name == "train")
    assert "covariance" in stage.inputs()
    from dataclasses import replace

    assert main(train_command(replace(stage, output=tmp_path / "again"))) == 0
    assert read_json(tmp_path / "again" / "history.json")[-1]["loss"] == history[-1]["loss"]
    with pytest.raises(ConfigError, match="old: method o-lora needs old data"):
        load_config(path, ["old=null"])
    assert "capture" not in stage_names(load_config(path, ["adapter.options.previous=weights"]))
