"""Fused LoRA layers in two processes: replicated by DistributedDataParallel, sharded by FSDP2."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import kore_kernels as kk
from kore.acceleration import accelerate
from tests.acceleration_models import frozen_lora, kore_model, step
from tests.batches import make_batch
from tests.processes import run_processes


def shard(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAP = {"ddp": torch.nn.parallel.DistributedDataParallel, "fsdp2": shard}


MAKE = {"single": frozen_lora, "grouped": kore_model}


def work(rank: int, how: str, layers: str, folder: Path) -> None:
    """Two steps on the same batch in every process, so that the mean gradient is that of one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, one, several, calls = MAKE[layers](), kk.lora_fa_linear, kk.lora_fa_linears, {"one": 0, "several": 0}
    accelerate(model)

    def counted(name, operation):
        def call(*arguments, **keywords):
            calls[name] += 1
            return operation(*arguments, **keywords)

        return call

    kk.lora_fa_linear, kk.lora_fa_linears = counted("one", one), counted("several", several)
    batch = make_batch("llama")
    wrapped = WRAP[how](model)
    for _ in range(2):
        wrapped.zero_grad()
        wrapped(**{**batch, "labels": batch["input_ids"]}).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}
    torch.save((calls, gradients), folder / f"rank{rank}.pt")
    dist.barrier()
    os._exit(0)  # a fork of a process with threads may wait for them for ever if it ends in the ordinary way


NO_CPU = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch has no FSDP2 on CPUs")


@pytest.mark.parametrize("layers", MAKE)
@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp2", marks=NO_CPU)])
def test_two_processes_have_the_gradients_of_peft_in_one(how, layers, tmp_path):
    model = MAKE[layers]()
    assert run_processes(work, [(rank, how, layers, tmp_path) for rank in range(2)]) == [0, 0]
    _, expected = step(model)
    # Two decoder layers, twice: alone, or q + k + v, o, gate + up, down.
    counts = {"single": {"one": 28, "several": 0}, "grouped": {"one": 8, "several": 8}}
    for rank in range(2):
        calls, gradients = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert calls == counts[layers] and gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert (gradient.double() - expected[name]).norm() <= 3e-5 * expected[name].norm(), name
