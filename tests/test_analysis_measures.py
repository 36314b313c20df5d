"""Reconstruction, retention, similarity and energy ratio against explicit inputs in float64."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kore.analysis import (
    Update,
    discard_errors,
    frobenius_similarity,
    leak_and_energy_ratio,
    map_similarity,
    measure_update,
    read_updates,
    spectrum,
)
from kore.analysis.reconstruction import METHODS
from kore.errors import ArtifactError
from kore.nullspace import energy_ratio


def rows(tokens, d, seed):
    """Graded inputs: channels of very different size, mixed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, d, dtype=torch.float64, generator=generator) * torch.logspace(0, -3, d, dtype=torch.float64)
    return x @ torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(9))).Q


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9)])
def test_discard_errors_are_those_of_the_definition_on_explicit_inputs(shape):
    d_out, d_in = shape
    weight = torch.randn(d_out, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x, held = rows(60, d_in, 0), rows(50, d_in, 3)
    C, H = x.T @ x, held.T @ held
    values, Q = torch.linalg.eigh(C)
    scales = {
        "svd": torch.eye(d_in, dtype=torch.float64),
        "asvd": torch.diag(C.diagonal() ** 0.25),
        "co-svd": C,
        "co-svd-root": Q @ torch.diag(values.sqrt()) @ Q.T,
    }
    errors = discard_errors(weight, C, {"seen": C, "held": H})
    assert set(errors) == set(METHODS)
    for method, S in scales.items():
        U, sigma, Vt = torch.linalg.svd(weight @ S, full_matrices=False)
        for r in range(len(sigma) + 1):
            k = len(sigma) - r
            kept = U[:, :k] @ torch.diag(sigma[:k]) @ Vt[:k] @ torch.linalg.inv(S)
            for name, data in (("seen", x), ("held", held)):
                explicit = float((data @ (weight - kept).T).norm() / (data @ weight.T).norm())
                assert float(errors[method][name][r]) == pytest.approx(explicit, rel=1e-6, abs=1e-9)


def test_the_root_of_c_is_best_on_its_own_data_and_a_singular_c_costs_nothing_there():
    weight = torch.randn(10, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = rows(4, 16, 0)  # of rank 4: 6 of 10 components can go
    errors = discard_errors(weight, x.T @ x, {"seen": x.T @ x, "none": torch.zeros(16, 16)})
    best = errors["co-svd-root"]["seen"]
    for method in METHODS:
        assert bool((best <= errors[method]["seen"] + 1e-7).all())
        assert not errors[method]["none"].any()
    assert float(best[6]) < 1e-6 < 1e-3 < float(errors["svd"]["seen"][6])


def test_retention_is_exact_and_below_its_bound():
    generator = torch.Generator().manual_seed(0)
    x = rows(80, 12, 0)
    weakest = torch.linalg.eigh(x.T @ x).eigenvectors[:, :3].T
    for A in (weakest, torch.randn(3, 12, dtype=torch.float64, generator=generator)):
        for _ in range(5):
            B = torch.randn(6, 3, dtype=torch.float64, generator=generator)
            found = measure_update(Update(A, B, 0.5), x.T @ x)
            assert found.change == pytest.approx(float((x @ A.T @ B.T * 0.5).norm()), rel=1e-6)
            assert found.change <= found.bound
            tight = float(torch.linalg.matrix_norm(0.5 * B, 2)) * float((x @ A.T).norm())
            assert found.bound == pytest.approx(tight, rel=1e-6)
    one = measure_update(Update(A[:1], B[:, :1], 1.0), x.T @ x)
    assert one.change == pytest.approx(one.bound, rel=1e-9)  # rank 1: no slack


def test_energy_ratio_from_a_spectrum_is_that_of_null_space():
    C = rows(100, 20, 0).T @ rows(100, 20, 0)
    U = torch.linalg.qr(torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))).Q
    weakest = torch.linalg.eigh(C).eigenvectors[:, :4]
    assert leak_and_energy_ratio(U, C, spectrum(C))[1] == pytest.approx(energy_ratio(C, U), rel=1e-9)
    assert leak_and_energy_ratio(weakest, C, spectrum(C))[1] == pytest.approx(1, rel=1e-6)
    assert leak_and_energy_ratio(U, 0 * C, spectrum(0 * C)) == (0.0, 1.0)


def test_similarity_of_data_sets():
    C = rows(100, 20, 0).T @ rows(100, 20, 0)
    other = torch.diag(torch.linspace(0, 1, 20, dtype=torch.float64))
    by_hand = float((C * other).sum() / C.norm() / other.norm())
    found = frobenius_similarity([C, 3 * C, other, 0 * C])
    assert found[0, 1] == pytest.approx(1) and found[0, 2] == pytest.approx(by_hand)
    assert found[3].tolist() == [0, 0, 0, 1] and np.allclose(found, found.T)
    maps = [C.abs().numpy(), other.numpy()]
    assert map_similarity(maps)[0, 1] == pytest.approx(np.corrcoef(maps[0].ravel(), maps[1].ravel())[0, 1])


def save(directory, config, tensors):
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def test_updates_follow_the_scaling_of_peft(tmp_path):
    names = ("h.0.q_proj", "h.0.up_proj")
    tensors = {f"base_model.model.{name}.lora_A.weight": torch.ones(4, 6) for name in names}
    tensors |= {f"base_model.model.{name}.lora_B.weight": torch.ones(5, 4) for name in names}
    config = {"lora_alpha": 8, "r": 2, "alpha_pattern": {"up_proj": 20}}
    plain = read_updates(save(tmp_path / "plain", config, tensors))
    assert [plain[name].scaling for name in names] == [2, 5] and plain[names[0]].B.shape == (5, 4)
    rs = read_updates(save(tmp_path / "rs", {**config, "use_rslora": True}, tensors))
    assert rs[names[0]].scaling == 4
    with pytest.raises(ArtifactError, match="DoRA"):
        read_updates(save(tmp_path / "dora", {**config, "use_dora": True}, tensors))
    tensors.pop("base_model.model.h.0.q_proj.lora_B.weight")
    with pytest.raises(ArtifactError, match=r"h\.0\.q_proj has lora_A but no lora_B"):
        read_updates(save(tmp_path / "half", config, tensors))
