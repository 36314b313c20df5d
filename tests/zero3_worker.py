"""Initialisation and training under DeepSpeed ZeRO-3, for test_zero3: under torchrun, once for all cases."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from transformers.pytorch_utils import Conv1D

import kore
import kore_kernels as kk
from kore.adapter.factors import read_weight
from kore.errors import ModelError
from kore.models import linear_shape
from tests.acceleration_models import frozen_lora, kore_model
from tests.batches import MODELS, make_batch

STEPS = 3
CONFIGS = {
    "rank": kore.KoreConfig(rank=5),
    "energy": kore.KoreConfig(rank="energy:0.02"),
    "random": kore.KoreConfig(rank=5, constraint="none"),
}
MAKE = {"single": frozen_lora, "grouped": kore_model, "dropout": lambda: frozen_lora(lora_dropout=0.3)}

# Who is fused and when, and the model of it.
CASES = {
    "plain": "single",
    "fused": "single",
    "fused late": "single",
    "fused late, merged asked for": "single",
    "fused checkpointing": "single",
    "plain grouped": "grouped",
    "fused grouped": "grouped",
    "fused dropout": "dropout",
    "fused dropout checkpointing": "dropout",
}

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,  # every parameter is partitioned,
        "stage3_prefetch_bucket_size": 10_000,  # and some are gathered ahead
    },
}


def optimizer(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(case: str, calls: dict[str, int]) -> dict:
    model = MAKE[CASES[case]]()
    if "checkpointing" in case:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if "fused" in case and "late" not in case:
        kore.accelerate(model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer(model), config=CONFIG)
    if "late" in case:
        done = kore.accelerate(model, mode="merged" if "merged" in case else "exact")
        assert "merged" not in case or set(done.exact.values()) == {"its weights are not here to be measured"}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(0)
    calls.update(one=0, several=0)
    losses, gradients = [], {}
    for step in range(STEPS):
        loss = engine(**make_batch("llama", seed=int(os.environ["RANK"]))).loss
        losses.append(loss.item())
        engine.backward(loss)
        if step == 0:
            gradients = {name: safe_get_full_grad(p).clone() for name, p in trained.items()}
        engine.step()
    B = {name: safe_get_full_fp32_param(p).clone() for name, p in trained.items()}
    engine.destroy()
    return {"losses": losses, "gradients": gradients, "B": B, "calls": dict(calls)}


def partitioned(model: torch.nn.Module) -> torch.nn.Module:
    deepspeed.zero.Init(module=model, config_dict_or_path=CONFIG)
    assert all(hasattr(p, "ds_id") and p.numel() == 0 for p in model.parameters())
    return model


def refused(call) -> str:
    try:
        call()
    except ModelError as error:
        return str(error)
    raise AssertionError("not refused")


def initialise(folder: Path) -> dict:
    """Adapters on partitioned models: saved, trained and saved again; and what is refused."""
    rank, cov = os.environ["RANK"], kore.load_covariance(folder / "covariance")
    for case, config in CONFIGS.items():
        made = kore.get_kore_model(partitioned(MODELS["llama"]()), cov, config, progress=False)
        assert not any(hasattr(p, "ds_id") for name, p in made.named_parameters() if ".lora_" in name)
        kore.save_adapter(made, folder / f"{case}-{rank}")
    made = kore.get_kore_model(partitioned(MODELS["llama"]()), cov, CONFIGS["rank"], progress=False)
    engine, *_ = deepspeed.initialize(model=made, optimizer=optimizer(made), config=CONFIG)
    loss = engine(**make_batch("llama", seed=int(rank))).loss
    engine.backward(loss)
    engine.step()
    apart = refused(lambda: kore.save_adapter(made, folder / f"apart-{rank}"))
    factors = [parameter for name, parameter in made.named_parameters() if ".lora_" in name]
    with deepspeed.zero.GatheredParameters(factors):
        kore.save_adapter(made, folder / f"trained-{rank}")
    engine.destroy()
    conv = partitioned(Conv1D(6, 4))
    shape, weight = linear_shape(conv), read_weight("conv", conv)
    with deepspeed.zero.GatheredParameters([conv.weight]):
        equal = torch.equal(weight, conv.weight.mT)
    base = partitioned(MODELS["llama"]())
    with deepspeed.zero.Init(config_dict_or_path=CONFIG):
        inside = refused(lambda: kore.get_kore_model(base, cov, CONFIGS["rank"], progress=False))
    return {"apart": apart, "inside": inside, "conv": (shape, equal)}


def main() -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    folder = Path(sys.argv[1])
    torch.save(initialise(folder), folder / f"init{os.environ['RANK']}.pt")
    calls: dict[str, int] = {}

    def counted(name, operation):
        def call(*arguments, **keywords):
            calls[name] += 1
            return operation(*arguments, **keywords)

        return call

    kk.lora_fa_linear = counted("one", kk.lora_fa_linear)
    kk.lora_fa_linears = counted("several", kk.lora_fa_linears)
    results = {case: train(case, calls) for case in CASES}
    torch.save(results, folder / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
