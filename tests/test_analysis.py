"""Leak and spectrum against their definitions on rows."""

from __future__ import annotations

import pytest
import torch

from kore import analysis
from kore.adapter import KoreConfig, get_kore_model, save_adapter
from kore.capture import capture_covariance
from kore.covariance import CovarianceSet, Group
from kore.errors import ArtifactError, KoreError
from tests.batches import MODELS, make_batches


def test_leak_is_the_share_of_energy_in_the_rows_of_a():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 12, dtype=torch.float64, generator=generator)
    A = torch.randn(3, 12, dtype=torch.float64, generator=generator) * torch.tensor([[1e-3], [1.0], [50.0]])
    cov = CovarianceSet(
        {"a": x.T @ x, "c": torch.zeros(12, 12)}, [Group("a", ("a", "b"), 12), Group("c", ("c",), 12)], {}
    )
    U = torch.linalg.qr(A.T).Q
    expected = float((x @ U).square().sum() / x.square().sum())
    found = analysis.leak({"b": A, "a": torch.cat([A, A[:1] + A[1:2]]), "c": A, "elsewhere": A}, cov)
    assert list(found) == ["b", "a", "c"] and found["c"] == 0
    assert found["b"] == pytest.approx(expected, rel=1e-12) and found["a"] == pytest.approx(expected, rel=1e-9)


def test_leak_of_kore_is_below_that_of_a_random_a_and_the_same_from_model_and_files(tmp_path):
    batches = make_batches("llava", 6)
    cov = capture_covariance(MODELS["llava"](), batches, dtype=torch.float64)
    leaks = {}
    for constraint in ("null_space", "none"):
        model = get_kore_model(MODELS["llava"](), cov, KoreConfig(rank=6, constraint=constraint))
        leaks[constraint] = analysis.leak(model, cov)
        save_adapter(model, tmp_path / constraint)
        from_files = analysis.leak(tmp_path / constraint, cov)
        assert from_files == pytest.approx(leaks[constraint]) and set(from_files) == set(cov.modules)
    for name in cov.modules:
        smallest = torch.linalg.eigvalsh(cov[name])[:6].sum() / cov[name].trace()
        assert leaks["null_space"][name] == pytest.approx(float(smallest), rel=1e-4)
        assert leaks["null_space"][name] < 0.5 * leaks["none"][name]


def test_spectrum_is_descending_float64():
    values = analysis.spectrum(torch.diag(torch.tensor([1.0, 3.0, 2.0])))
    assert values.dtype == torch.float64 and values.tolist() == pytest.approx([3, 2, 1])


def test_errors(tmp_path):
    cov = CovarianceSet({"a": torch.eye(4)}, [Group("a", ("a",), 4)], {})
    with pytest.raises(KoreError, match="none of the adapter's layers"):
        analysis.leak({"b": torch.eye(4)}, cov)
    with pytest.raises(KoreError, match="d_in = 3"):
        analysis.leak({"a": torch.ones(2, 3)}, cov)
    with pytest.raises(KoreError, match="expected a model with a LoRA adapter"):
        analysis.leak(MODELS["llama"](), cov)
    with pytest.raises(ArtifactError, match="no such file"):
        analysis.leak(tmp_path, cov)
