"""Adapters made and trained under DeepSpeed ZeRO-3, whose parameters are gathered from two processes when needed."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import kore
from kore.artifacts import load_tensors
from tests.batches import MODELS, make_batch, make_batches
from tests.processes import torchrun

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

LAYERS = 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What both processes wrote."""
    folder = tmp_path_factory.mktemp("zero3")
    kore.capture_covariance(MODELS["llama"](), make_batches("llama"), progress=False).save(folder / "covariance")
    done = torchrun("tests.zero3_worker", str(folder), timeout=300, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    """What both processes found in training, by case."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(ranks):
    """The same steps of plain PEFT in one process, the loss the mean over both processes' batches."""
    from tests.zero3_worker import MAKE, STEPS, optimizer

    found = {}
    for kind in ("single", "grouped"):
        model = MAKE[kind]()
        adamw, gradients = optimizer(model), {}
        for step in range(STEPS):
            model.zero_grad()
            (sum(model(**make_batch("llama", seed=rank)).loss for rank in range(2)) / 2).backward()
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            if step == 0:
                gradients = {name: p.grad.clone() for name, p in trained.items()}
            adamw.step()
        found[kind] = {"gradients": gradients, "B": {name: p.detach() for name, p in trained.items()}}
    return found


def assert_near(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys() and ours
    for name, expected in theirs.items():
        assert (ours[name].double() - expected.double()).norm() <= tolerance * expected.double().norm(), name


CASES = ["fused", "fused late", "fused late, merged asked for", "fused checkpointing", "fused grouped"]


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_trained_weights_are_those_of_peft(case, ranks, alone):
    kind = "grouped" if "grouped" in case else "single"
    plain = "plain grouped" if "grouped" in case else "plain"
    for results in ranks:
        ours, theirs = results[case], results[plain]
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
        for what in ("gradients", "B"):
            assert_near(ours[what], theirs[what], 1e-4)
            assert_near(ours[what], alone[kind][what], 1e-4)
            assert_near(theirs[what], alone[kind][what], 1e-4)


def test_dropout_is_repeated_by_checkpointing(ranks):
    for results in ranks:
        ours, expected = results["fused dropout checkpointing"], results["fused dropout"]
        assert ours["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert_near(ours["gradients"], expected["gradients"], 1e-4)


def test_every_layer_runs_fused_and_alone(ranks):
    for results in ranks:
        for case, result in results.items():
            passes = 2 if "checkpointing" in case else 1
            calls = LAYERS * 3 * passes if "fused" in case else 0
            assert result["calls"] == {"one": calls, "several": 0}, case


@pytest.mark.parametrize("case", ["rank", "energy", "random"])
def test_partitioned_weights_give_the_adapter_that_one_process_makes(folder, tmp_path, case):
    from tests.zero3_worker import CONFIGS

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cov = kore.load_covariance(folder / "covariance")
    kore.save_adapter(kore.get_kore_model(MODELS["llama"](), cov, CONFIGS[case], progress=False), tmp_path / "one")
    torch.set_num_threads(threads)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        for rank in range(2):
            assert (folder / f"{case}-{rank}" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_a_trained_adapter_is_saved_whole_or_not_at_all(folder):
    started = load_tensors(folder / "rank-0" / "adapter_model.safetensors")
    for rank in range(2):
        assert not (folder / f"apart-{rank}").exists()
        trained = load_tensors(folder / f"trained-{rank}" / "adapter_model.safetensors")
        assert trained.keys() == started.keys() and len(trained) == 2 * LAYERS
        for name, factor in trained.items():
            assert torch.equal(factor, started[name]) == (".lora_A." in name)


def test_what_partitioned_weights_do_not_allow_is_said(folder):
    for rank in range(2):
        found = torch.load(folder / f"init{rank}.pt", weights_only=True)
        assert "is partitioned by DeepSpeed ZeRO-3" in found["apart"] and "GatheredParameters" in found["apart"]
        assert "outside deepspeed.zero.Init" in found["inside"]
        assert found["conv"] == ((6, 4), True)
