"""The Triton kernels on a machine without a GPU: run in the interpreter, and compiled for three architectures.

Both in processes of their own: the interpreter replaces the compiler from the first import of Triton on.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import INTERPRETER

if INTERPRETER or importlib.util.find_spec("triton") is None:
    pytest.skip("starts processes that run Triton", allow_module_level=True)

ROOT = Path(__file__).parents[2]
# One case for each entry of the configuration tables; .ci/run audits every variant.
EVERY_CONFIG = "covariance bfloat16 mask|covariance float32 weight|symmetrize|bfloat16 adapter$|float32 with float32"


def start(*arguments: str, **environment: str) -> subprocess.Popen:
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "KORE_BACKEND")}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output[-6000:]
    return output


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The long ones start together: the suite's tests in the interpreter beside the compiler."""
    from benchmarks.kernel_audit import architectures

    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels")
    started = {"interpreter": start(*command, TRITON_INTERPRET="1")}
    audit = ("-m", "benchmarks.kernel_audit", "--only", EVERY_CONFIG, "--arch", *map(str, architectures()))
    rows = tmp_path_factory.mktemp("audit") / "rows.json"
    started["audit"] = start(*audit, "--json", str(rows))
    yield {**started, "rows": rows}
    for process in started.values():
        process.kill()


def test_operations_in_the_interpreter(processes):
    output = finish(processes["interpreter"])
    passed = re.search(r"(\d+) passed", output)
    assert passed and int(passed.group(1)) > 150, output[-2000:]


def test_every_configuration_compiles_and_uses_the_tensor_cores(processes):
    from benchmarks.kernel_audit import architectures

    finish(processes["audit"])
    rows = json.loads(processes["rows"].read_text())
    assert {row["arch"] for row in rows} == set(architectures())
    assert {row["kernel"] for row in rows} >= {"_covariance", "_symmetrize", "_two_products", "_gradients"}
    assert all(row["registers"] > 0 and not row["problems"] for row in rows)
    tensor_core = {arch: {n for row in rows if row["arch"] == arch for n in row["tensor_core"]} for arch in (80, 90)}
    assert tensor_core == {80: {"mma.sync"}, 90: {"wgmma.mma_async"}}


AUDIT_A_TILE_TOO_LARGE = """
import sys
from benchmarks import kernel_audit
from kore_kernels.covariance_update import configs
configs.HALF[80] = configs.TritonConfig(block=64, block_n=128, num_warps=4, num_stages=8)
sys.exit(0 if kernel_audit.main(["--arch", "80", "--only", "covariance bfloat16$"]) == 1 else 1)
"""


def test_audit_fails_on_a_tile_that_does_not_fit():
    output = finish(start("-c", AUDIT_A_TILE_TOO_LARGE))
    assert re.search(r"spills \d+ bytes|bytes of shared memory", output)


COMPILATIONS = """
import torch
from benchmarks.kernel_audit import compiled
from kore_kernels.covariance_update.triton import covariance_update
from kore_kernels.lora_fa_linear.triton import backward, forward
def meta(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")
W, A, B, C = meta(256, 128), meta(40, 128), meta(256, 40), torch.empty(128, 128, device="meta")
for n in (1, 2, 16, 17, 1000, 2048, 4099):
    with compiled(90) as kernels:
        covariance_update(C, meta(n, 128), None, None, 1.0)
        forward(meta(n, 128), W, None, A, B, 1.0)
        backward(meta(n, 256), W, A, B, meta(n, 48), 1.0)
    print("hashes", *[kernel.hash for _, kernel in kernels])
"""


def test_the_number_of_rows_never_recompiles():
    lines = [line for line in finish(start("-c", COMPILATIONS)).splitlines() if line.startswith("hashes")]
    assert len(lines) == 7 and len(set(lines)) == 1
    assert len(lines[0].split()) == 1 + 5
