"""Fused LoRA layers under DeepSpeed ZeRO-3, whose parameters are gathered from two processes when they are needed."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.batches import make_batch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

REPOSITORY = Path(__file__).parents[1]
LAYERS = 14


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes found, by case."""
    folder = tmp_path_factory.mktemp("zero3")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    # A session of its own, so that a run that hangs is ended with all its processes.
    with subprocess.Popen(
        [*command, "-m", "tests.zero3_worker", str(folder)],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError("the processes hang") from None
    assert process.returncode == 0, output[-4000:]
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
