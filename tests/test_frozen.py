"""A stays frozen through everything PEFT, a Trainer and DistributedDataParallel do to trainable flags."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from kore.adapter import FrozenLinear, KoreConfig, freeze_a, get_kore_model, load_kore_model, save_adapter
from tests.batches import MODELS, logits, make_batch, make_batches


def kore_model(kind="llama", rank=4):
    return get_kore_model(MODELS[kind](), None, KoreConfig(rank=rank, constraint="none", modules_to_save="auto"))


def factors(model):
    return {name: p for name, p in model.named_parameters() if ".lora_A." in name}


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def step(model, lr=0.1):
    """One optimiser step over everything that says it is trainable; True if B moved."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1)
    model(**make_batch("llama")).loss.backward()
    assert all(p.grad is None for p in factors(model).values())
    optimizer.step()
    optimizer.zero_grad()
    return any(p.any() for name, p in model.named_parameters() if ".lora_B." in name)


def set_adapter(model):
    model.set_adapter("default")


def switch_adapters(model):
    from peft import LoraConfig

    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    model.set_adapter("default")


def disable_and_enable(model):
    with model.disable_adapter():
        pass
    model.base_model.enable_adapter_layers()


def reload_as_the_trainer_does(model, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    model.load_adapter(tmp_path / "checkpoint", model.active_adapter, is_trainable=True)


def checkpointing(model):
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()


def flags_by_hand(model):
    for parameter in model.parameters():
        parameter.requires_grad = ".lora" in "".join(name for name, p in model.named_parameters() if p is parameter)
    model.train()


def layer_flags(model):
    for module in model.modules():
        if hasattr(module, "lora_A"):
            for layer in module.lora_A.values():
                layer.requires_grad_(True)
                for parameter in layer.parameters():
                    parameter.requires_grad_(True)


@pytest.mark.parametrize(
    "act",
    [
        nn.Module.train,
        set_adapter,
        switch_adapters,
        disable_and_enable,
        reload_as_the_trainer_does,
        checkpointing,
        flags_by_hand,
        layer_flags,
    ],
    ids=lambda act: act.__name__,
)
def test_a_does_not_train_after(act, tmp_path):
    model = kore_model()
    before = {name: p.clone() for name, p in factors(model).items()}
    expected = trainable(model)
    act(model, tmp_path) if act is reload_as_the_trainer_does else act(model)
    assert expected and trainable(model) == expected
    assert step(model)
    for name, p in factors(model).items():
        if name in before:
            assert torch.equal(p, before[name])


def test_no_gradient_reaches_a_even_with_its_flag_set():
    model = kore_model()
    model.requires_grad_(True)
    assert all(p.requires_grad for p in factors(model).values())
    before = {name: p.clone() for name, p in factors(model).items()}
    assert step(model)
    assert all(torch.equal(p, before[name]) for name, p in factors(model).items())


def test_a_saved_and_loaded_adapter_stays_frozen_and_trains_on(tmp_path):
    model = kore_model("llava")
    save_adapter(model, tmp_path / "a")
    loaded = load_kore_model(MODELS["llava"](), tmp_path / "a", trainable=True)
    assert trainable(loaded) == trainable(model) and any("modules_to_save" in name for name in trainable(loaded))
    assert not trainable(load_kore_model(MODELS["llava"](), tmp_path / "a"))


def test_freeze_a_on_an_adapter_that_stock_peft_loaded(tmp_path):
    from peft import PeftModel

    model = kore_model()
    model.save_pretrained(tmp_path / "plain")
    stock = PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "plain", is_trainable=True)
    assert any(".lora_A." in name for name in trainable(stock))
    parameters = {name: id(p) for name, p in stock.named_parameters()}
    keys = list(stock.state_dict())
    assert freeze_a(freeze_a(stock)) is stock
    assert trainable(stock) == trainable(model)
    assert {name: id(p) for name, p in stock.named_parameters()} == parameters and list(stock.state_dict()) == keys


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_frozen_too(how):
    model = kore_model()
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    other.set_adapter("default")
    assert trainable(other) == trainable(model)
    assert any(isinstance(module, FrozenLinear) for module in other.modules())
    torch.testing.assert_close(logits(other, make_batch("llama")), logits(model, make_batch("llama")))
    assert step(other)


def test_moving_and_casting_keep_it_frozen():
    model = kore_model().to(torch.bfloat16).to("cpu").float()
    model.set_adapter("default")
    assert not any(".lora_A." in name for name in trainable(model))


def test_a_layer_reports_and_counts_its_weight():
    layer = FrozenLinear.from_linear(nn.Linear(5, 3, bias=False))
    assert sum(p.numel() for p in layer.parameters()) == 15 and "frozen" in repr(layer)
    assert list(layer.state_dict()) == ["weight"] and dict(layer.named_parameters())["weight"].requires_grad is False
    x = torch.randn(2, 5, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(dim=0).expand(2, 5))
    with pytest.raises(ValueError, match="without bias"):
        FrozenLinear.from_linear(nn.Linear(2, 2))


def test_trainer_resume(tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = [{key: value[0] for key, value in batch.items()} for batch in make_batches("llama", 8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )

    def run(resume):
        model = kore_model()
        before = {name: p.clone() for name, p in factors(model).items()}
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        assert all(torch.equal(p, before[name]) for name, p in factors(model).items())
        assert not any(".lora_A." in name for name in trainable(model))
        return {name: p.detach() for name, p in model.named_parameters() if ".lora_B." in name}

    whole = run(None)
    resumed = run(str(tmp_path / "checkpoint-2"))
    assert any(p.any() for p in whole.values())
    for name, p in whole.items():
        torch.testing.assert_close(resumed[name], p, rtol=0, atol=0)


DDP = """
    import os, sys, torch, torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from kore.adapter import save_adapter
    from tests.batches import make_batch
    from tests.test_frozen import factors, kore_model

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = kore_model()
    before = {name: p.clone() for name, p in factors(model).items()}
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    for step in range(3):
        wrapped(**make_batch("llama", seed=10 * step + rank)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(p, before[name]) for name, p in factors(model).items())
    B = torch.cat([p.detach().flatten() for name, p in model.named_parameters() if ".lora_B." in name])
    assert bool(B.any())
    other = [torch.empty_like(B) for _ in range(2)]
    dist.all_gather(other, B)
    assert torch.equal(other[0], other[1])
    if rank == 0:
        save_adapter(wrapped, sys.argv[1])
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(textwrap.dedent(DDP))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run([*command, str(tmp_path / "a")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    model = load_kore_model(MODELS["llama"](), tmp_path / "a", trainable=True)
    assert not any(".lora_A." in name for name in trainable(model))
