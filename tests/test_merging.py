from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import kore
from kore.adapter import save_adapter
from kore.data import Encoder, load_conversations
from kore.errors import ArtifactError, ConfigError, ModelError
from kore.models import load_model
from kore.training import train
from tests.tiny import save_tiny, tiny_conversations, tiny_llama, tiny_tokenizer
from tests.training_worker import prepared

QUICK = dict(batch_size=4, epochs=2, learning_rate=5e-2, logging_steps=1, save_steps=None, report_to=[], progress=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("merging")
    for kind in ("llava", "qwen_vl", "llama"):
        save_tiny(kind, root / kind)
    tiny_conversations(root / "data", 8)
    tiny_conversations(root / "text", 8, text_only=True)
    return root


def conversations(root: Path, kind: str):
    if kind == "llama":
        return load_conversations(root / "text" / "conversations.json")
    return load_conversations(root / "data" / "conversations.json", image_root=root / "data" / "images")


@pytest.mark.parametrize("kind", ["llava", "qwen_vl", "llama"])
def test_merged_model_and_stock_peft_give_the_training_models_logits(root: Path, tmp_path: Path, kind: str) -> None:
    model, encoder = prepared(kind, root)
    data = conversations(root, kind)
    result = train(model, encoder, data, QUICK, tmp_path / "train")
    batch = encoder.collate([encoder.encode(item) for item in data])
    untouched = load_model(root / kind, dtype="float32", device="cpu")
    with torch.no_grad():
        expected = model(**batch).logits
        assert (untouched(**batch).logits - expected).abs().max() > 1e-2
        stock = PeftModel.from_pretrained(untouched, str(result.adapter_dir)).eval()
        torch.testing.assert_close(stock(**batch).logits, expected, rtol=0, atol=1e-5)
        output = kore.merge(root / kind, result.adapter_dir, tmp_path / "merged")
        merged = load_model(output, device="cpu")
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=0, atol=1e-5)
    for name in ("preprocessor_config.json", "processor_config.json", "tokenizer.json", "generation_config.json"):
        assert (output / name).is_file() == (root / kind / name).is_file(), name
    again = Encoder.from_pretrained(output).encode(data[0])
    for key, value in encoder.encode(data[0]).items():
        torch.testing.assert_close(again[key], value, rtol=0, atol=0)


def test_merged_model_takes_a_second_round(root: Path, tmp_path: Path) -> None:
    from kore.baselines import prepare_model

    data = conversations(root, "llava")
    model, encoder = prepared("llava", root)
    first = train(model, encoder, data, QUICK, tmp_path / "one")
    merged = kore.merge(root / "llava", first.adapter_dir, tmp_path / "merged-one")
    model = prepare_model(load_model(merged, device="cpu"), "random-a", rank=4, seed=1, progress=False)
    second = train(model, Encoder.from_pretrained(merged), data, QUICK, tmp_path / "two")
    assert second.history[-1]["loss"] < first.history[-1]["loss"]
    with pytest.raises(ModelError, match="another model: other weights"):
        kore.merge(root / "llava", second.adapter_dir, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    output = kore.merge(merged, second.adapter_dir, tmp_path / "merged-two")
    batch = encoder.collate([encoder.encode(item) for item in data])
    with torch.no_grad():
        logits = load_model(output, device="cpu")(**batch).logits
        torch.testing.assert_close(logits, model(**batch).logits, rtol=0, atol=1e-5)


def test_biases_and_dtype_are_kept(tmp_path: Path) -> None:
    base = tiny_llama(attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    base.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tiny_tokenizer("llama").save_pretrained(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    lora = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    save_adapter(lora, tmp_path / "adapter")
    kore.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == weights.keys() and any(name.endswith("bias") for name in merged)
    changed = {name for name in merged if not torch.equal(merged[name], weights[name])}
    assert changed == {name for name in weights if name.endswith(("q_proj.weight", "down_proj.weight"))}
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


def test_bad_inputs_are_one_line_and_leave_nothing(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"it has no adapter_config.json"):
        kore.merge(root / "llama", tmp_path / "none", tmp_path / "out")
    lora = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "plain")
    kore.merge(root / "llama", tmp_path / "plain", tmp_path / "from-plain")
    with pytest.raises(ConfigError, match=r"output_dir .* is also model_path"):
        kore.merge(tmp_path / "from-plain", tmp_path / "plain", tmp_path / "from-plain")
    file = tmp_path / "plain" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match="not a PEFT adapter of this model") as caught:
        kore.merge(root / "llama", tmp_path / "plain", tmp_path / "out")
    assert "\n" not in str(caught.value)
    config = tmp_path / "plain" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "target_modules": ["no_such_proj"]}))
    with pytest.raises(ArtifactError, match="not a PEFT adapter of this model"):
        kore.merge(root / "llama", tmp_path / "plain", tmp_path / "out")
    assert not (tmp_path / "out").exists()
