from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kore.data import Conversation, Message, load_conversations
from kore.errors import ConfigError, DataError, KoreError, ModelError
from kore.training import TrainConfig, train
from tests.tiny import save_tiny, tiny_conversations
from tests.training_worker import prepared

QUICK = dict(batch_size=4, logging_steps=1, save_steps=None, report_to=[], progress=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("training")
    for kind in ("llava", "qwen_vl", "llama"):
        save_tiny(kind, root / kind)
    tiny_conversations(root / "data", 8)
    tiny_conversations(root / "text", 8, text_only=True)
    return root


def pictured(root: Path):
    return load_conversations(root / "data" / "conversations.json", image_root=root / "data" / "images")


def spoken(root: Path):
    return load_conversations(root / "text" / "conversations.json")


def values(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["llava", "qwen_vl", "llama"])
def test_trains_b_and_projector_only_and_writes_everything(root: Path, tmp_path: Path, kind: str) -> None:
    model, encoder = prepared(kind, root)
    before = values(model)
    data = spoken(root) if kind == "llama" else pictured(root)
    result = train(model, encoder, data, dict(QUICK, epochs=4, learning_rate=5e-2, report_to="tensorboard"), tmp_path)
    changed = {name for name, value in values(model).items() if not torch.equal(value, before[name])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_B" in name or "modules_to_save" in name for name in changed)
    assert any("modules_to_save" in name for name in changed) == (kind != "llama")
    assert [entry["step"] for entry in result.history] == list(range(1, 9))
    assert result.history[-1]["loss"] < result.history[0]["loss"] - 0.1
    assert json.loads((tmp_path / "history.json").read_text()) == result.history
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.glob("runs/**/events.*"))
    assert result.adapter_dir == tmp_path / "adapter" and (tmp_path / "adapter" / "kore.json").is_file()
    assert not model.training


def test_two_learning_rates_with_one_schedule(root: Path, tmp_path: Path) -> None:
    model, encoder = prepared("llava", root)
    config = dict(QUICK, epochs=10, learning_rate=1e-3, projector_learning_rate=1e-5, warmup_ratio=0.2)
    history = train(model, encoder, pictured(root), config, tmp_path).history
    steps, warm = 20, 4
    ahead = history[0]["learning_rate"] > 0  # earlier transformers log the rate of the next step
    for entry in history:
        done = entry["step"] - 1 + ahead
        cosine = 0.5 * (1 + math.cos(math.pi * (done - warm) / (steps - warm)))
        expected = done / warm if done < warm else cosine
        assert entry["learning_rate"] == pytest.approx(1e-3 * expected, abs=1e-12)
        assert entry["projector_learning_rate"] == pytest.approx(1e-5 * expected, abs=1e-14)


def test_first_step_moves_each_group_by_its_own_rate(root: Path, tmp_path: Path) -> None:
    """The first step of Adam moves every weight with a gradient by its learning rate."""
    model, encoder = prepared("llava", root)
    before = values(model)
    config = dict(QUICK, max_steps=1, learning_rate=1e-3, projector_learning_rate=1e-5, warmup_ratio=0)
    train(model, encoder, pictured(root), config, tmp_path)
    for name, after in values(model).items():
        moved = (after - before[name]).abs().max().item()
        expected = 1e-5 if "modules_to_save" in name else 1e-3 if "lora_B" in name else 0
        assert moved == pytest.approx(expected, rel=2e-2), name


def test_loss_is_the_mean_over_answer_tokens_however_the_batch_is_split(root: Path, tmp_path: Path) -> None:
    runs = []
    for batch, accumulation, checkpointing in ((8, 1, False), (2, 4, False), (8, 1, True)):
        model, encoder = prepared("llava", root)
        config = dict(
            QUICK,
            batch_size=batch,
            gradient_accumulation=accumulation,
            gradient_checkpointing=checkpointing,
            epochs=3,
            learning_rate=1e-3,
        )
        mixed = [*pictured(root)[:4], *spoken(root)[:4]]
        runs.append((train(model, encoder, mixed, config, tmp_path / f"{len(runs)}").history, values(model)))
    model, encoder = prepared("llava", root)
    total = count = 0.0
    for conversation in mixed:
        example = encoder.collate([encoder.encode(conversation)])
        labels = example.pop("labels")[:, 1:]
        log_probabilities = model(**example).logits[:, :-1].double().log_softmax(-1)
        picked = log_probabilities.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        total, count = total - picked[labels != -100].sum().item(), count + (labels != -100).sum().item()
    assert runs[0][0][0]["loss"] == pytest.approx(total / count, rel=1e-5)
    for history, weights in runs[1:]:
        for entry, reference in zip(history, runs[0][0], strict=True):
            assert entry["loss"] == pytest.approx(reference["loss"], rel=1e-4)
        for name, weight in weights.items():
            torch.testing.assert_close(weight, runs[0][1][name], rtol=1e-3, atol=2e-5)


def test_full_training_writes_a_model_that_loads(root: Path, tmp_path: Path) -> None:
    from kore.data import Encoder
    from kore.models import load_model

    model, encoder = prepared("llava", root, "full")
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    before = values(model)
    result = train(model, encoder, pictured(root), dict(QUICK, epochs=1, learning_rate=1e-3), tmp_path)
    assert result.adapter_dir is None and result.model_dir == tmp_path / "model"
    assert frozen and all(torch.equal(before[name], values(model)[name]) for name in frozen)
    loaded = load_model(tmp_path / "model")
    for name, value in values(model).items():
        torch.testing.assert_close(loaded.get_parameter(name), value, rtol=0, atol=0)
    example = Encoder.from_pretrained(tmp_path / "model").encode(pictured(root)[0])
    torch.testing.assert_close(example["input_ids"], encoder.encode(pictured(root)[0])["input_ids"])
    again, _ = prepared("llava", root, "full")
    config = dict(QUICK, epochs=1, learning_rate=1e-3)
    stored = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    assert train(again, encoder, pictured(root), config, tmp_path).history == result.history
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == stored
    torch.testing.assert_close(values(again), values(model), rtol=0, atol=0)


def test_finished_run_is_returned_and_another_is_refused(root: Path, tmp_path: Path) -> None:
    config = dict(QUICK, epochs=2, learning_rate=5e-3)
    model, encoder = prepared("llava", root)
    first = train(model, encoder, pictured(root), config, tmp_path)
    stored = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    again, _ = prepared("llava", root)
    second = train(again, encoder, pictured(root), dict(config, logging_steps=2), tmp_path)
    assert second.history == first.history
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == stored
    torch.testing.assert_close(values(again), values(model), rtol=0, atol=0)
    other, _ = prepared("llava", root)
    with pytest.raises(ConfigError, match=r"learning_rate was 0.005, is 0.001.*resume=False"):
        train(other, encoder, pictured(root), dict(config, learning_rate=1e-3), tmp_path)
    with pytest.raises(ConfigError, match="other data"):
        train(other, encoder, pictured(root)[:4], config, tmp_path)
    with pytest.raises(ConfigError, match="other start"):
        train(again, encoder, pictured(root), config, tmp_path)
    fresh = train(other, encoder, pictured(root)[:4], config, tmp_path, resume=False)
    assert len(fresh.history) == 2


def test_what_cannot_be_trained_is_refused_in_one_line(root: Path, tmp_path: Path) -> None:
    model, encoder = prepared("llava", root)
    empty = Conversation("e", (), (Message("user", "Q"),), "d.json:9")
    with pytest.raises(DataError, match=r"d.json:9: the conversation has no answer; on_bad_row='skip'"):
        train(model, encoder, [*pictured(root), empty], QUICK, tmp_path)
    result = train(model, encoder, [*pictured(root), empty], dict(QUICK, on_bad_row="skip", epochs=1), tmp_path)
    assert [row.source for row in result.bad_rows] == ["d.json:9"]
    with pytest.raises(DataError, match="max_length 12"):
        train(model, encoder, pictured(root), dict(QUICK, max_length=12, on_bad_row="skip"), tmp_path / "b")
    with pytest.raises(ConfigError, match="trainer_arguments: fantasy: no such field"):
        train(model, encoder, pictured(root), dict(QUICK, trainer_arguments={"fantasy": 1}), tmp_path / "c")
    for wrong in ({"deepspeed": "none.json"}, {"report_to": "no_such_logger"}, {"optimizer": "no_such_optimizer"}):
        with pytest.raises(ConfigError, match="training cannot start with this configuration"):
            train(model, encoder, pictured(root), {**QUICK, **wrong}, tmp_path / "c")
    with pytest.raises(KoreError, match="training loss is nan at step"):
        train(prepared("llava", root)[0], encoder, pictured(root), dict(QUICK, learning_rate=1e30), tmp_path / "d")
    with pytest.raises(ModelError, match="nothing in the model is trainable"):
        train(model.requires_grad_(False), encoder, pictured(root), QUICK, tmp_path / "e")
    with pytest.raises(ConfigError, match=r"train.learning_rat: no such setting; expected one of learning_rate, "):
        TrainConfig.of({"learning_rat": 1})
    with pytest.raises(ConfigError, match=r"train.epochs: input should be greater than 0, got -1"):
        train(model, encoder, pictured(root), {"epochs": -1}, tmp_path / "e")


def test_unreadable_image_in_a_worker_process_is_one_line(root: Path, tmp_path: Path) -> None:
    data = pictured(tiny_conversations(tmp_path / "w" / "data", 4).parent.parent)
    image = data[2].images[0]
    image.write_bytes(image.read_bytes()[:70])
    model, encoder = prepared("llava", root)
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"^\S*conversations.json:\d+: image \S* cannot be decoded") as caught:
            train(model, encoder, data, dict(QUICK, dataloader_workers=workers), tmp_path / f"out{workers}")
        assert "\n" not in str(caught.value)


def test_truncation_is_reported_once_with_totals(root: Path, tmp_path: Path, caplog) -> None:
    model, encoder = prepared("llava", root)
    config = dict(QUICK, max_length=64, epochs=1)
    lost = 0
    for conversation in pictured(root):
        lost += max(0, len(encoder.encode(conversation)["input_ids"]) - 64)
    train(model, encoder, pictured(root), config, tmp_path)
    messages = [r.getMessage() for r in caplog.records if "max_length" in r.getMessage()]
    assert lost and f"2 of 8 examples cut to max_length 64: {lost} tokens lost at their ends" in messages
    assert encoder.max_length is None


def test_checkpoints_hold_the_adapter_only(root: Path, tmp_path: Path) -> None:
    model, encoder = prepared("llava", root)
    config = dict(QUICK, epochs=3, save_steps=1, save_total_limit=2)
    train(model, encoder, pictured(root), config, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    tensors = load_file(tmp_path / "checkpoint-6" / "adapter_model.safetensors")
    assert all("lora_" in name or "multi_modal_projector" in name for name in tensors)
    assert not (tmp_path / "checkpoint-6" / "model.safetensors").exists()
    final = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    torch.testing.assert_close(tensors, final, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["random-a", "full"])
def test_bf16_keeps_trained_weights_in_float32_and_gives_the_model_back_in_its_dtype(
    root: Path, tmp_path: Path, method: str
) -> None:
    model, encoder = prepared("llava", root, method, dtype="bfloat16")
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    config = dict(QUICK, bf16=True, epochs=4, learning_rate=1e-2, projector_learning_rate=1e-6, save_steps=4)
    result = train(model, encoder, pictured(root), config, tmp_path)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    file = {"random-a": "adapter_model.safetensors", "full": "trained.safetensors"}[method]
    assert {value.dtype for value in load_file(tmp_path / "checkpoint-8" / file).values()} == {torch.float32}
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == dtypes
    batch = encoder.collate([encoder.encode(item) for item in pictured(root)])
    assert torch.isfinite(model(**batch).logits).all()


def test_the_history_ends_with_the_last_step(root: Path, tmp_path: Path) -> None:
    model, encoder = prepared("llama", root)
    result = train(model, encoder, spoken(root), dict(QUICK, max_steps=3, logging_steps=10), tmp_path)
    assert [entry["step"] for entry in result.history] == [1, 3]
