"""tools/hub_repository.py: the Hugging Face kernels package loads what it makes, beside an installed kore_kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import hub_repository

from .wheels import ROOT, make_wheel


def test_each_wheel_has_its_variants(tmp_path):
    names = {
        "kore_lmm-0.1.0-py3-none-any.whl": {"torch-cpu": "cpu", "torch-cuda": "cuda"},
        "kore_lmm-0.1.0-cp311-cp311-manylinux_2_34_x86_64.whl": {"torch-stable-abi26-cpu-x86_64-linux": "cpu"},
        "kore_lmm-0.1.0-cp311-cp311-linux_aarch64.whl": {"torch-stable-abi26-cpu-aarch64-linux": "cpu"},
        "kore_lmm-0.1.0+cu130-cp312-cp312-manylinux_2_27_x86_64.manylinux_2_34_x86_64.whl": {
            "torch-stable-abi26-cu130-x86_64-linux": "cuda"
        },
    }
    assert {name: hub_repository.variants(Path(name)) for name in names} == names
    with pytest.raises(SystemExit, match="expected a pure wheel or one for Linux, got platform win_amd64"):
        hub_repository.variants(Path("kore_lmm-0.1.0-cp311-cp311-win_amd64.whl"))


def test_imports_become_relative():
    source = "from kore_kernels import checks\n    from kore_kernels.gpu import pick\n@op('x')\nop(\"kore::a\")\n"
    inside = hub_repository.relative(source, "op/native.py", "other")
    assert inside == "from .. import checks\n    from ..gpu import pick\n@op('x')\nop(\"other::a\")\n"
    assert hub_repository.relative(source, "gpu.py", "other").startswith("from . import checks\n    from .gpu import")
    with pytest.raises(SystemExit, match="expected 'from kore_kernels import"):
        hub_repository.relative("import kore_kernels\n", "gpu.py", "other")


def test_the_output_must_be_empty(tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hub_repository.py", str(wheel), "-o", str(tmp_path)])
    with pytest.raises(SystemExit, match="must be empty or new"):
        hub_repository.main()


USE = """
import sys
from pathlib import Path
import torch
import kernels
hub = kernels.get_local_kernel(Path(sys.argv[1]), backend="cpu")
import kore_kernels
x = torch.ones(2, 3, dtype=torch.bfloat16)
for copy in (hub, kore_kernels):
    assert torch.equal(copy.symmetrize_(copy.covariance_update_(torch.zeros(3, 3), x)), torch.full((3, 3), 2.0))
    B = torch.zeros(5, 2, requires_grad=True)
    copy.lora_fa_linear(torch.ones(4, 3), torch.ones(5, 3), None, torch.ones(2, 3), B).sum().backward()
    assert B.grad.eq(12).all()
assert hub.covariance_update_ is not kore_kernels.covariance_update_
strays = [name for name in sys.modules if name.startswith("kore_kernels.") and "/hub/" in str(sys.modules[name])]
assert not strays, strays
print(hub.__file__)
print(hub.backends()["native"].detail)
"""


def test_the_kernels_package_loads_it(tmp_path):
    pytest.importorskip("kernels", reason="loads through it")
    assert hub_repository.add(make_wheel(tmp_path), tmp_path / "hub" / "build")
    metadata = json.loads((tmp_path / "hub" / "build" / "torch-cpu" / "metadata.json").read_text())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path / "hub")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    place, detail = run.stdout.splitlines()
    assert place == str(tmp_path / "hub" / "build" / "torch-cpu" / "kore_kernels" / "__init__.py")
    assert detail.startswith("no compiled kernels")
    assert metadata["id"] == "kore_kernels_torch_cpu"
