"""Accelerated models under torch.compile and in training runs that plain models resume, and the other way round."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import kore
from kore.acceleration import FusedLinear, accelerate, decelerate
from kore.data import load_conversations
from kore.training import train
from tests.acceleration_models import assert_same_step, kore_model, step
from tests.tiny import save_tiny, tiny_conversations
from tests.training_worker import prepared


@pytest.mark.slow
def test_a_whole_model_compiles_to_the_same_step():
    """Compiled, the layers of a group run singly; the accelerated model breaks no graph that the plain one keeps."""
    model = kore_model()
    theirs = step(model)

    def compiled_step():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        found = step(Compiled(model))
        return found, dict(torch._dynamo.utils.counters["graph_break"])

    breaks = compiled_step()[1]
    accelerate(model)
    ours, our_breaks = compiled_step()
    assert_same_step(ours, theirs, 3e-5)
    assert our_breaks == breaks


class Compiled:
    """A model whose calls are compiled and whose parameters have their own names."""

    def __init__(self, model):
        self.call, self.zero_grad, self.named_parameters = (
            torch.compile(model, backend="aot_eager"),
            model.zero_grad,
            model.named_parameters,
        )

    def __call__(self, **batch):
        return self.call(**batch)


def test_a_decoder_layer_compiles_in_one_graph():
    model = kore_model()
    accelerate(model)
    decoder = model.base_model.model.model
    x = torch.randn(2, 9, 48, requires_grad=True)
    places = decoder.rotary_emb(x, torch.arange(9)[None])
    layer = decoder.layers[0]
    results = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = call(x, position_embeddings=places)
        y = y[0] if isinstance(y, tuple) else y
        results.append((y, *torch.autograd.grad(y.square().sum(), [x, layer.self_attn.q_proj.lora_B.default.weight])))
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


CONFIG = dict(batch_size=4, epochs=4, logging_steps=1, save_steps=4, report_to=[], progress=False, learning_rate=1e-2)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("acceleration")
    save_tiny("llama", root / "llama")
    tiny_conversations(root / "data", 8, text_only=True)
    return root


@pytest.mark.parametrize("first", ["accelerated", "plain"])
def test_kore_train_resumes_the_other_form(root, tmp_path, first):
    """Stopped after its checkpoint in the middle, a run goes on in the other form to where the plain run arrives."""
    data = load_conversations(root / "data" / "conversations.json", image_root=root / "data" / "images")

    def run(folder, fused, stop=None):
        model, encoder = prepared("llama", root)
        if fused:
            assert not accelerate(model).left
        if stop:
            from kore.training.trainer import KoreTrainer

            save = KoreTrainer._save_checkpoint

            def save_and_fail(self, *arguments):
                save(self, *arguments)
                raise KeyboardInterrupt

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(KoreTrainer, "_save_checkpoint", save_and_fail)
                with pytest.raises(KeyboardInterrupt):
                    train(model, encoder, data, CONFIG, folder)
            return None
        result = train(model, encoder, data, CONFIG, folder)
        assert any(type(m) is FusedLinear for m in model.modules()) == fused
        return result

    expected = run(tmp_path / "plain", False)
    run(tmp_path / "both", first == "accelerated", stop=4)
    result = run(tmp_path / "both", first != "accelerated")
    assert [entry["step"] for entry in result.history] == list(range(1, 9))
    for ours, theirs in zip(result.history, expected.history):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    trained = [load_file(r.adapter_dir / "adapter_model.safetensors") for r in (result, expected)]
    assert trained[0].keys() == trained[1].keys()
    for name, tensor in trained[1].items():
        torch.testing.assert_close(trained[0][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_the_trainer_of_transformers_resumes_the_other_form(tmp_path):
    from transformers import Trainer, TrainingArguments

    batches = [
        {"input_ids": ids, "labels": ids} for ids in torch.randint(20, 300, (8, 12), generator=torch.Generator())
    ]

    def run(folder, fused, steps, **resume):
        model = kore_model()
        if fused:
            assert len(accelerate(model).groups) == 4
        arguments = TrainingArguments(
            str(folder),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        Trainer(model, arguments, train_dataset=batches).train(**resume)
        return {n: p.detach().clone() for n, p in decelerate(model).named_parameters() if "lora_" in n}

    expected = run(tmp_path / "plain", False, 4)
    for first in (True, False):
        run(tmp_path / f"{first}", first, 2)
        ours = run(tmp_path / f"{first}", not first, 4, resume_from_checkpoint=True)
        for name, tensor in expected.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_any_peft_lora_after_freeze_a():
    """Without KORE: PEFT's own A, frozen; only B trains, and the fused step is PEFT's."""
    from peft import LoraConfig, get_peft_model

    from tests.batches import MODELS

    for options in ({}, {"use_rslora": True}, {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"q_proj": 7}}):
        torch.manual_seed(0)
        names = ["q_proj", "v_proj", "down_proj"]
        model = get_peft_model(MODELS["llama"](), LoraConfig(r=6, target_modules=names, **options)).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
        assert "kore.freeze_a" in str(accelerate(model))
        assert not accelerate(model).accelerated
        kore.freeze_a(model)
        theirs = step(model)
        done = accelerate(model)
        assert len(done.accelerated) == 6 and not done.left and not done.groups
        assert_same_step(step(model), theirs, 1e-5)
        assert all("lora_B" in name for name in theirs[1])
