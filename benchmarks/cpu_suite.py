"""The kernels' CPU paths beside the plain PyTorch expressions, as ratios measured in one run.

    python -m benchmarks.cpu_suite [--output benchmarks/results/cpu.json] [--threads 2] [--rounds 15]

First every contender is checked against float64, then the contenders of a case are timed in turn, round by round, and
the ratios of their medians are stored with the commit and the hardware.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import kore_kernels as kk
from kore.environment import environment

RESULT = Path(__file__).parent / "results" / "cpu.json"
Step = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """Contenders that compute the same; ``ours`` is timed against ``peer``, by its label."""

    title: str
    ours: str
    peer: str
    contenders: dict[str, Step]
    error: Callable[[Step], float]
    reduction: int


def covariance(d: int, n: int, dtype: torch.dtype) -> Case:
    """One update of C (d, d) float32 with x (n, d)."""
    torch.manual_seed(0)
    x = torch.randn(n, d).to(dtype)
    C = torch.zeros(d, d)
    exact = (x.double().T @ x.double()).tril()

    def plain() -> None:
        rows = x.float()
        C.addmm_(rows.T, rows)

    def error(step: Step) -> float:
        C.zero_()
        step()
        return float((C.tril().double() - exact).norm() / exact.norm())

    contenders: dict[str, Step] = {
        "covariance_update_": lambda: kk.covariance_update_(C, x),
        "C.addmm_(x.T, x)": plain,
    }
    title = f"covariance update, {str(dtype).removeprefix('torch.')} x ({n}, {d})"
    return Case(title, "covariance_update_", "C.addmm_(x.T, x)", contenders, error, n)


def lora(d_in: int, d_out: int, tokens: int, rank: int) -> Case:
    """Forward and backward of a frozen-A LoRA linear in float32."""
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
        y = step()
        pairs = [(y, exact), (x.grad, exact_dx), (B.grad, exact_dB)]
        return max(
            float((ours.detach().double() - true).norm() / true.norm()) for ours, true in pairs if ours is not None
        )

    contenders: dict[str, Step] = {
        "lora_fa_linear": lambda: run(lambda: kk.lora_fa_linear(x, weight, None, A, B)),
        "F.linear(x, W) + F.linear(F.linear(x, A), B)": lambda: run(
            lambda: F.linear(x, weight) + F.linear(F.linear(x, A), B)
        ),
    }
    title = f"frozen-A LoRA, forward + backward, {d_in} → {d_out}, {tokens} tokens, rank {rank}"
    return Case(
        title,
        "lora_fa_linear",
        "F.linear(x, W) + F.linear(F.linear(x, A), B)",
        contenders,
        error,
        max(d_in, d_out, tokens),
    )


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Check every contender, then time them in turn; medians in milliseconds and the ratio peer / ours."""
    errors = {name: case.error(step) for name, step in case.contenders.items()}
    floor = 2.0**-24 * case.reduction**0.5
    if not errors[case.ours] <= 2 * errors[case.peer] + floor:
        raise SystemExit(f"{case.title}: relative errors {errors}: {case.ours} is not accurate, nothing is timed")
    times: dict[str, list[float]] = {name: [] for name in case.contenders}
    for round_ in range(rounds + 2):
        for name, step in case.contenders.items():
            start = time.perf_counter()
            step()
            if round_ >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    ratios = [peer / ours for ours, peer in zip(times[case.ours], times[case.peer])]
    return {
        "case": case.title,
        "ours": case.ours,
        "peer": case.peer,
        "median_ms": {name: statistics.median(values) for name, values in times.items()},
        "speed_up": statistics.median(ratios),
        "speed_up_range": [min(ratios), max(ratios)],
        "relative_error": errors,
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = [
        covariance(1024, 2048, torch.float32),
        covariance(4096, 2048, torch.float32),
        covariance(1024, 2048, torch.bfloat16),
        covariance(4096, 2048, torch.bfloat16),
        lora(2048, 2048, 1024, 235),
        lora(2048, 5504, 1024, 235),
    ]
    results = []
    for case in cases:
        results.append(measure(case, arguments.rounds))
        print(f"{results[-1]['speed_up']:5.2f} ×  {case.title}", flush=True)
    stored = {"threads": arguments.threads, "environment": environment(), "results": results}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
