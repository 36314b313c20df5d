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
EVERY_CONFIG = (
    "covariance bfloat16( mask)?$|covariance float32 mask weight|small|symmetrize float32$|bfloat16 adapter$|"
    "float32 with float32"
)


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
    assert {row["kernel"] for row in rows} >= {
        "_covariance",
        "_add_parts",
        "_symmetrize",
        "_two_products",
        "_gradients",
    }
    assert all(row["registers"] > 0 and not row["problems"] for row in rows)
    tensor_core = {arch: {n for row in rows if row["arch"] == arch for n in row["tensor_core"]} for arch in (80, 90)}
    assert tensor_core == {80: {"mma.sync"}, 90: {"wgmma.mma_async"}}


AUDIT_A_BAD_TILE = """
import sys
from benchmarks import kernel_audit
from kore_kernels.covariance_update import configs
configs.AS_IS[80] = configs.TritonConfig(*{tile})
sys.exit(0 if kernel_audit.main(["--arch", "80", "--only", "covariance bfloat16$"]) == 1 else 1)
"""


@pytest.mark.parametrize(
    ("tile", "problem"),
    [
        ((64, 128, 128, 4, 8, 1), r"spills \d+ bytes|bytes of shared memory"),
        ((64, 64, 32, 4, 1, 1), "no asynchronous load"),
    ],
)
def test_audit_fails_on_a_bad_tile(tile, problem):
    from benchmarks.kernel_audit import triton_version

    if "asynchronous" in problem and triton_version() < (3, 4):
        pytest.skip("the audit asks for loads ahead from Triton 3.4 on")
    assert re.search(problem, finish(start("-c", AUDIT_A_BAD_TILE.format(tile=tile))))


COMPILATIONS = """
import torch
from benchmarks.kernel_audit import compiled
from kore_kernels.covariance_update.triton import covariance_update
from kore_kernels.lora_fa_linear.triton import backward, forward
def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")
W, A, B, seed = meta(256, 128), meta(40, 128), meta(256, 40), meta(1, dtype=torch.int64)
wide = dict(dtype=torch.float32)
W32, A32, B32 = meta(256, 128, **wide), meta(40, 128, **wide), meta(256, 40, **wide)
C, mask = {d: meta(d, d, dtype=torch.float32) for d in (128, 1000, 777)}, dict(dtype=torch.bool)
variants = {
    "tma": lambda n: covariance_update(C[1000], meta(n, 1000), None, None, 1.0, "lower"),
    "tma, float32": lambda n: covariance_update(C[128], meta(n, 128, dtype=torch.float32), None, None, 1.0, "lower"),
    "pointers": lambda n: covariance_update(C[128], meta(n, 128), meta(n, **mask), None, 1.0, "upper"),
    "copied": lambda n: covariance_update(C[777], meta(n, 777), None, meta(n), 1.0, "lower"),
    "forward": lambda n: forward(meta(n, 128, **wide), W32, None, A32, B32, 1.0),
    "backward": lambda n: backward(meta(n, 256, **wide), W32, A32, B32, meta(n, 48, **wide), 1.0),
    "mixed forward": lambda n: forward(meta(n, 128), W, None, A32, B32, 1.0),
    "mixed backward": lambda n: backward(meta(n, 256), W, A32, B32, meta(n, 48, **wide), 1.0),
    "dropout forward": lambda n: forward(meta(n, 128), W, None, A, B, 1.0, n / 2**14, seed),
    "dropout backward": lambda n: backward(meta(n, 256), W, A, B, meta(n, 48), 1.0, n / 2**14, seed),
}
for name, call in variants.items():
    kernels = []
    for n in (1, 2, 16, 17, 600, 2048, 4099, 8192):
        with compiled(90) as launched:
            call(n)
        kernels += launched
    print("compiled", name, "|", *sorted({(kernel, compiled.hash): kernel for kernel, compiled in kernels}.values()))
"""


def test_the_number_of_rows_never_recompiles():
    """Nor does the dropout rate, which varies with it here. Tiles are cut when there are many rows: the kernel that
    adds the parts up is the only one that N can add. Under dropout a two-byte layer needs one kernel each way."""
    lines = [line for line in finish(start("-c", COMPILATIONS)).splitlines() if line.startswith("compiled")]
    covariance = ["_add_parts", "_covariance"]
    assert [line.split(" | ")[1].split() for line in lines[:4]] == [covariance] * 4
    assert [len(line.split(" | ")[1].split()) for line in lines[4:]] == [2, 2, 2, 2, 1, 1]
