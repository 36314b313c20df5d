"""The kernels, the capture and training steps on the CPU beside what they replace, as ratios measured in one run.

    python -m benchmarks.cpu_suite [--output benchmarks/results/cpu.json] [--threads 2] [--rounds 15] [--only lora]

Every contender is checked against float64 before it is timed; contenders take turns; commit and hardware are stored.
``--only`` measures some parts anew and keeps the others' stored results, each with its own environment.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import kore_kernels as kk
from benchmarks import bench_capture, peak_memory
from kore.bench import covariance, init, init_cases, llava, lora_peers, peers, step, step_peers
from kore.bench import lora as bench_lora
from kore.bench.lora_layers import Case
from kore.bench.machine import describe, measure_roofline
from kore.bench.show import write_json
from kore.bench.timing import Clock
from kore.environment import environment

RESULT = Path(__file__).parent / "results" / "cpu.json"
CPU = torch.device("cpu")
RANK, LORA_RANK = 235, 128
SHAPES = ((2048, (2048,)), (2048, (5504,)), (2048, (2048,) * 3), (2048, (5504,) * 2))
LAYERS = [Case(d_in, d_out, 1024, RANK, torch.float32) for d_in, d_out in SHAPES]
STACK = step_peers.LlamaShape(layers=2, width=1024, inner=2752, heads=16, vocabulary=2048)
INIT_LAYER, INIT_COVARIANCE, INIT_MODEL = (1024, 2752, 64), (4096, 235), (llava.SMALL, 6, 64)
UPDATES = [(dtype, d, 2048) for dtype in (torch.float32, torch.bfloat16) for d in (1024, 4096)]


def updates(rounds: int) -> dict[str, Any]:
    """One covariance update, with every peer that runs here."""
    clock = Clock(CPU)
    roofline = measure_roofline(clock, (torch.float32, torch.bfloat16))
    cases = []
    for dtype, d, n in UPDATES:
        cases.append(covariance.measure(d, n, dtype, clock, peers.select(CPU, dtype)[0], rounds))
        values = cases[-1]["contenders"]
        shown = ", ".join(f"{name} {each['ours_is_faster']['median']:.2f} ×" for name, each in values.items())
        print(f"{cases[-1]['dtype']} d={d}: {shown}", flush=True)
    roofline = roofline.best(measure_roofline(clock, (torch.float32, torch.bfloat16)))
    return {"roofline": roofline.as_dict(), "cases": [covariance.against(case, roofline) for case in cases]}


def memory(rounds: int) -> dict[str, Any]:
    """Peak extra memory of one update at d = 4096, N = 2048; see ``peak_memory`` for how."""
    names = (peers.OURS, peers.ADDMM, "C += x.T @ x")
    found = {
        dtype: {name: peak_memory.measured(name, dtype, threads=torch.get_num_threads()) for name in names}
        for dtype in ("float32", "bfloat16")
    }
    print({dtype: {name: f"{size / 2**20:.1f} MiB" for name, size in row.items()} for dtype, row in found.items()})
    return {"d": 4096, "n": 2048, "bytes": found}


def capture(rounds: int) -> dict[str, Any]:
    """A pass over a small LLaVA: what a capture adds to it, beside what the official hooks add."""
    found = bench_capture.measure(min(rounds, 9))
    print({name: share["of_medians"] for name, share in found["overhead_of_official"].items()}, flush=True)
    return found


def lora(rounds: int) -> dict[str, Any]:
    """Frozen-A LoRA layers, forward and backward, with every peer that runs here."""
    clock, cases, left_out = Clock(CPU), [], {}
    for case in LAYERS:
        running, reasons = lora_peers.select(case, CPU)
        left_out.update(reasons)
        cases.append(bench_lora.measure(case, clock, running, rounds, seconds=25.0))
        ratios = {name: f"{row['over_frozen']['median']:.3f}" for name, row in cases[-1]["contenders"].items()}
        print(f"{case.shape}, floor {case.floor():.3f}, over frozen: {ratios}", flush=True)
    return {"cases": cases, "left_out": left_out, "goals": [_lora_goals(case) for case in cases]}


def _lora_goals(case: dict[str, Any]) -> dict[str, Any]:
    """Six points above the flop floor at most, of the medians; and no slower than PEFT with A frozen."""
    ours, peft = (case["contenders"][name] for name in (lora_peers.OURS, lora_peers.PEFT))
    return {
        "layers": case["shape"],
        "over_frozen": {"goal": ours["floor"] + 0.06, "found": ours["over_frozen"]["median"]},
        "PEFT over ours": {"goal": 1.0, "found": peft["ours_is_faster"]["median"]},
    }


def training_step(rounds: int) -> dict[str, Any]:
    """A training step of a small decoder stack, adapted in different ways."""
    base = step_peers.random_llama(STACK, CPU, torch.float32)
    batch = step.text_batch(STACK.vocabulary, 1, 512, CPU)
    found = step.measure(base, batch, Clock(CPU), RANK, LORA_RANK, rounds, seconds=30.0)
    for name, row in found["contenders"].items():
        print(
            f"{name}: {row['tokens_per_second']:.0f} tokens/s, {row['over_frozen']['median']:.3f} of frozen", flush=True
        )
    return {**found, "layers": STACK.layers, "d": STACK.width, "f": STACK.inner}


def initialisation(rounds: int) -> dict[str, Any]:
    """A decoder layer, one wide covariance, and a whole small model with its capture, beside the official recipe."""
    found = {
        "layer": init.run(init.Plan(*INIT_LAYER, rounds=min(rounds, 9)), CPU),
        "covariance": init_cases.run_covariance(
            init_cases.CovariancePlan(*INIT_COVARIANCE, rounds=min(rounds, 3)), CPU
        ),
        "model": init_cases.run_model(init_cases.ModelPlan(*INIT_MODEL, rounds=min(rounds, 3)), CPU),
    }
    for name, case in found.items():
        faster = case["ours_is_faster"][init.OFFICIAL]["median"]
        print(f"{name}: {case['median_s'][init.OURS]:.2f} s, official recipe {faster:.1f} ×", flush=True)
    goals = {name: {"goal": 10.0, "found": found[name]["ours_is_faster"][init.OFFICIAL]["median"]} for name in found}
    return {**found, "goals": goals}


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "covariance": updates,
    "memory": memory,
    "capture": capture,
    "lora": lora,
    "step": training_step,
    "init": initialisation,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    whole = list(arguments.only) == list(PARTS)
    stored = {} if whole or not arguments.output.exists() else json.loads(arguments.output.read_text(encoding="utf-8"))
    backends = {name: str(info) for name, info in kk.backends().items()}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        made_with = {"environment": environment(), "machine": describe(CPU), "backends": backends}
        stored[name] = {**PARTS[name](arguments.rounds), **made_with}
        write_json(arguments.output, stored)


if __name__ == "__main__":
    main()
