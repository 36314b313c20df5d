"""The kernels and the capture on the CPU beside what they replace, as ratios measured in one run.

    python -m benchmarks.cpu_suite [--output benchmarks/results/cpu.json] [--threads 2] [--rounds 15] [--only lora]

Every contender is checked against float64 before it is timed; contenders take turns; commit and hardware are stored.
``--only`` measures some parts anew and keeps the others' stored results, each with its own environment.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import kore_kernels as kk
from benchmarks import bench_capture, peak_memory
from kore.bench import covariance, peers
from kore.bench.check import InaccurateError, allowed_error
from kore.bench.machine import describe, measure_roofline
from kore.bench.show import write_json
from kore.bench.timing import Clock, Step, in_turn, ratio
from kore.environment import environment

RESULT = Path(__file__).parent / "results" / "cpu.json"
CPU = torch.device("cpu")
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
    """Forward and backward of a frozen-A LoRA linear in float32."""
    cases = [_lora(d_in, d_out, 1024, 235, rounds) for d_in, d_out in ((2048, 2048), (2048, 5504))]
    for case in cases:
        print(f"{case['case']}: {case['speed_up']['median']:.2f} ×", flush=True)
    return {"cases": cases}


def _lora(d_in: int, d_out: int, tokens: int, rank: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(tokens, d_in, requires_grad=True)
    weight, A = torch.randn(d_out, d_in) / d_in**0.5, torch.randn(rank, d_in) / d_in**0.5
    B, g = torch.randn(d_out, rank, requires_grad=True), torch.randn(tokens, d_out)
    h = x.detach().double() @ A.double().T
    exact = x.detach().double() @ weight.double().T + h @ B.detach().double().T
    exact_dx = g.double() @ weight.double() + g.double() @ B.detach().double() @ A.double()
    exact_dB = g.double().T @ h

    def run(forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        x.grad = B.grad = None
        y = forward()
        y.backward(g)
        return y

    def error(step: Step) -> float:
        found: Sequence[Any] = (step().detach(), x.grad, B.grad)
        return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, (exact, exact_dx, exact_dB)))

    ours, peer = "lora_fa_linear", "F.linear(x, W) + F.linear(F.linear(x, A), B)"
    steps: dict[str, Step] = {
        ours: lambda: run(lambda: kk.lora_fa_linear(x, weight, None, A, B)),
        peer: lambda: run(lambda: F.linear(x, weight) + F.linear(F.linear(x, A), B)),
    }
    errors = {name: error(step) for name, step in steps.items()}
    title = f"frozen-A LoRA, forward + backward, {d_in} → {d_out}, {tokens} tokens, rank {rank}"
    if not errors[ours] <= allowed_error(errors[peer], max(d_in, d_out, tokens)):
        raise InaccurateError(f"{title}: relative errors {errors}")
    times = in_turn(steps, Clock(CPU).milliseconds, rounds)
    return {
        "case": title,
        "peer": peer,
        "median_ms": {name: statistics.median(values) for name, values in times.items()},
        "speed_up": ratio(times[peer], times[ours]),
        "relative_error": errors,
        "rounds": rounds,
    }


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "covariance": updates,
    "memory": memory,
    "capture": capture,
    "lora": lora,
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
