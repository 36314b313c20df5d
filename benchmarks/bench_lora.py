"""Frozen-A LoRA layers and whole training steps beside their peers, on this machine's CPU.

    pytest benchmarks/bench_lora.py --benchmark-only --benchmark-group-by=group

pytest-benchmark times one contender after the other. `kore bench lora` and benchmarks/cpu_suite.py take turns.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from kore.bench import step, step_peers
from kore.bench.check import PEER_TOLERANCE
from kore.bench.lora import Contender
from kore.bench.lora_layers import Case, Layers
from kore.bench.lora_peers import FROZEN, PEERS

CPU = torch.device("cpu")
STACK = step_peers.LlamaShape(layers=2, width=1024, inner=2752, heads=16, vocabulary=2048)
TOKENS, RANK, LORA_RANK = 512, 235, 128
CASES = [Case(1024, d_out, TOKENS, RANK, torch.float32) for d_out in ((1024,), (2752,), (1024,) * 3)]
MODELS = (
    step_peers.FROZEN,
    step_peers.peft_name(RANK),
    step_peers.peft_name(LORA_RANK, trained=True),
    step_peers.OURS,
    step_peers.MERGED,
    step_peers.OFFICIAL,
)
RUNNING = [(case, peer) for case in CASES for peer in PEERS if peer.refusal(case, CPU) is None]


@pytest.mark.parametrize("part", ["forward", "backward", "both"])
@pytest.mark.parametrize(("case", "peer"), RUNNING, ids=lambda value: getattr(value, "name", None) or value.shape)
def test_layers(benchmark, case, peer, part):
    layers = Layers.random(case, CPU)
    contender = Contender(peer.build(layers), layers)
    errors = contender.errors(layers, layers.exact()[peer.name != FROZEN])
    assert max(errors.values()) < PEER_TOLERANCE

    def graph() -> None:
        contender.clear()
        contender.forward()

    ready = {"forward": contender.clear, "backward": graph, "both": contender.clear}
    timed = {"forward": contender.forward, "backward": contender.backward, "both": contender.step}
    benchmark.group = f"{part}, {case.shape}, {TOKENS} tokens, rank {RANK}"
    benchmark.pedantic(timed[part], setup=ready[part], rounds=9, warmup_rounds=1)


@cache
def steps() -> dict[str, step.Step]:
    """Every model that can run here, checked against float64."""
    base = step_peers.random_llama(STACK, CPU, torch.float32)
    return step.checked(base, step.text_batch(STACK.vocabulary, 1, TOKENS, CPU), RANK, LORA_RANK)[0]


@pytest.mark.parametrize("name", MODELS)
def test_training_step(benchmark, name):
    benchmark.group = "training step of a 2-layer Llama"
    benchmark.pedantic(steps()[name], rounds=5, warmup_rounds=1)
