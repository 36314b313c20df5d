"""Peak memory of initialising a layer, beside the model, the covariance on disk and the finished adapter, on the CPU.

    python -m benchmarks.init_memory --width 1024 --inner 2752 --rank 64

A process of its own makes a Llama of one layer and covariances of a wide spectrum, saves these, and calls
``kore.get_kore_model`` with the saved set, after a tiny call that brings in all libraries. What the kernel counts as
the largest resident memory during the call, less what was resident before and less the adapter that is left, is given
in bytes and in units of the widest covariance in float64. Tensors get pages of their own, which go back when they are
freed (MALLOC_MMAP_THRESHOLD_). Linux with glibc only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

import kore
from benchmarks.peak_memory import peak_of
from kore.bench.init import Plan, graded_covariance
from kore.bench.step_peers import LlamaShape, random_llama
from kore.covariance import CovarianceSet, Group, load_covariance
from kore.models import model_fingerprint

GOAL = 3.0


def measured(width: int, inner: int, rank: int, solver: str = "auto", threads: int = 2) -> dict[str, Any]:
    """The peak of one initialisation in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.init_memory", "--width", str(width), "--inner", str(inner)]
    command += ["--rank", str(rank), "--solver", solver, "--threads", str(threads)]
    pages = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    here = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=here, env=pages)
    return dict(json.loads(done.stdout))


def layer(width: int, inner: int) -> torch.nn.Module:
    """A Llama of one layer and next to no vocabulary, in bfloat16."""
    return random_llama(LlamaShape(1, width, inner, 4, 16), torch.device("cpu"), torch.bfloat16).eval()


def save_covariances(model: torch.nn.Module, plan: Plan, path: Path) -> None:
    """Synthetic covariances of the layer's four inputs, made and written one after the other."""
    prefix = next(name for name in kore.models.language_model_linears(model)).partition("self_attn")[0]
    parts = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn"}
    members: dict[str, list[str]] = {}
    for name, (reads, _) in plan.layers().items():
        members.setdefault(reads, []).append(f"{prefix}{parts.get(name, 'mlp')}.{name}")
    groups = [Group(names[0], tuple(names), plan.inputs()[reads], 1 << 20) for reads, names in members.items()]
    made = {
        group.name: lambda group=group, seed=seed: graded_covariance(group.dim, 1e9, seed)
        for seed, group in enumerate(groups)
    }
    CovarianceSet(made, groups, model_fingerprint(model), dtype="float32").save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=2752)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--solver", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        size = (arguments.width, arguments.inner, arguments.rank)
        print(json.dumps(measured(*size, arguments.solver, arguments.threads)))
        return
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        made: list[Any] = []

        def initialise(width: int, inner: int, rank: int) -> int:
            model, path = layer(width, inner), Path(folder) / f"{width}"
            save_covariances(model, Plan(width, inner, rank, rounds=1), path)
            cov, config = load_covariance(path), kore.KoreConfig(rank=rank, solver=arguments.solver)
            return peak_of(
                lambda: made.append(kore.get_kore_model(model, cov, config, progress=False, distributed=False))
            )

        initialise(272, 280, 8)
        peak = initialise(arguments.width, arguments.inner, arguments.rank)
    adapter = sum(p.numel() * p.element_size() for name, p in made[-1].named_parameters() if ".lora_" in name)
    widest = 8 * max(arguments.width, arguments.inner) ** 2
    beside = max(0, peak - adapter)
    print(
        json.dumps(
            {
                "d": arguments.width,
                "f": arguments.inner,
                "rank": arguments.rank,
                "solver": arguments.solver,
                "bytes": beside,
                "adapter_bytes": adapter,
                "of_widest_covariance": beside / widest,
            }
        )
    )


if __name__ == "__main__":
    main()
