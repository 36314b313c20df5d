"""The two-sided penalty in two processes that share the weights (FSDP2) or the optimizer (DeepSpeed ZeRO)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from kore import capture_covariance, capture_output_gradients, two_sided
from kore.artifacts import read_json
from tests.acceleration_models import frozen_lora
from tests.batches import MODELS, make_batch, make_batches
from tests.processes import run_processes
from tests.tiny import save_tiny, tiny_conversations

REPOSITORY = Path(__file__).parents[1]

NO_CPU = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="this torch has no FSDP2 on CPUs")


def penalised(components: int | None):
    """A model with random B, and its penalty."""
    base, options = MODELS["llama"](), {"progress": False, "distributed": False}
    batches = make_batches("llama", 2)
    cov, gradients = (capture(base, batches, **options) for capture in (capture_covariance, capture_output_gradients))
    model = frozen_lora()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, two_sided(model, cov, gradients, 50.0, components=components)


def loss_of(model, penalty):
    batch = make_batch("llama")
    return model(**{**batch, "labels": batch["input_ids"]}).loss + penalty()


def work(rank: int, components: int | None, folder: Path) -> None:
    """Two steps on the same batch in every process, so that the mean gradient is that of one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, penalty = penalised(components)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    values = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = loss_of(model, penalty)
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert all(hasattr(term.B, "full_tensor") for term in penalty.terms)
    B = {name: p.full_tensor().detach() for name, p in model.named_parameters() if p.requires_grad}
    torch.save((values, B), folder / f"rank{rank}.pt")
    dist.barrier()
    os._exit(0)  # a fork of a process with threads may wait for them for ever if it ends in the ordinary way


@NO_CPU
@pytest.mark.parametrize("components", [None, 8])
def test_sharded_weights_take_the_steps_of_whole_ones(components, tmp_path):
    model, penalty = penalised(components)
    assert float(penalty().detach()) > 1e-3
    assert run_processes(work, [(rank, components, tmp_path) for rank in range(2)]) == [0, 0]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    expected = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = loss_of(model, penalty)
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    for rank in range(2):
        values, B = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert values == pytest.approx(expected, rel=1e-5)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(B[name], parameter.detach(), rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", [1, 2])
def test_zero_1_and_2_take_the_steps_of_plain_data_parallel(stage, tmp_path):
    save_tiny("llama", tmp_path / "llama")
    for name in ("data", "text"):
        tiny_conversations(tmp_path / name, 6, text_only=True)
    config = {"batch_size": 3, "max_steps": 4, "learning_rate": 1e-2, "optimizer": "sgd", "max_grad_norm": 1.0}
    config |= {"logging_steps": 1, "save_steps": None, "report_to": [], "progress": False}
    zero = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True, "gradient_clipping": 1.0}
    zero |= {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    found = {}
    for label, more in (("plain", {}), ("zero", {"deepspeed": zero})):
        options = {"kind": "llama", "method": "random-a", "strength": 3e7, "config": {**config, **more}}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += ["-m", "tests.training_worker", str(tmp_path), str(tmp_path / label), json.dumps(options)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-4000:]
        B = torch.load(tmp_path / label / "rank0.pt", weights_only=True)
        found[label] = read_json(tmp_path / label / "history.json"), B
        assert read_json(tmp_path / label / "adapter" / "kore.json")["method"] == "random-a"
    (plain, B), (history, other) = found["plain"], found["zero"]
    assert plain[-1]["penalty"] > 1e-2
    for wanted, entry in zip(plain, history):
        assert entry["loss"] == pytest.approx(wanted["loss"], rel=1e-4)
        assert entry["penalty"] == pytest.approx(wanted["penalty"], rel=1e-3, abs=1e-9)
    for name, value in B.items():
        torch.testing.assert_close(other[name].float(), value, rtol=1e-3, atol=1e-6, msg=name)
