"""Every test of an operation runs once for each backend that this process can run.

An ordinary run has ``native`` and ``reference``. With ``TRITON_INTERPRET=1`` the same tests run the Triton kernels in
the interpreter; ``test_triton.py`` starts that run.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["triton"] if INTERPRETER else ["native", "reference"])
def backend(request, monkeypatch) -> str:
    monkeypatch.setenv("KORE_BACKEND", request.param)
    return request.param


def pytest_collection_modifyitems(config, items):
    """In the interpreter, only what the backend can change, and the tests of the Triton code itself."""
    if INTERPRETER:
        kept = [item for item in items if "backend" in item.fixturenames or "test_interpreter" in item.path.stem]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty returns NaN, so that reading it shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().item()
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)
