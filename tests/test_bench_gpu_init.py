"""The initialisation's sections of the GPU suite on tiny shapes: gates that close, and what is extrapolated."""

from __future__ import annotations

import dataclasses
import json
import re
import time

import pytest
import torch

from benchmarks import gpu_init, gpu_init_times, gpu_suite
from kore.bench.timing import Clock

CPU = torch.device("cpu")


def make(tmp_path, seconds=100.0):
    suite = gpu_suite.Suite(CPU, True, tmp_path / "gpu.json", time.monotonic() + seconds, Clock(CPU))
    suite.deadline = suite.end
    return suite


def run(tmp_path, *names, seconds=100.0):
    """(exit status, what was written)"""
    return gpu_suite.run(make(tmp_path, seconds), list(names), None), json.loads((tmp_path / "gpu.json").read_text())


def only(monkeypatch, *spectra):
    monkeypatch.setattr(gpu_init, "spectra", lambda quick: list(spectra))


FULL = gpu_init.Spectrum(40, 6, torch.float64, condition=1e6)
EMPTY = gpu_init.Spectrum(40, 6, torch.float64, tokens=20)


@pytest.mark.parametrize(
    ("spectrum", "fault", "line"),
    [
        (FULL, "other directions", "energy ratio"),
        (EMPTY, "other directions", "energy .* where there is none"),
        (FULL, "not orthonormal", "UᵀU is .* away from the identity"),
        (FULL, "random", "the same call gave other bits"),
        (FULL, "says less", "says energy .*, holds"),
        (FULL, "writes C", "C was changed"),
        (FULL, "float32", "the basis is torch.float32"),
    ],
)
def test_every_fault_of_a_null_space_is_found_and_nothing_is_timed(tmp_path, monkeypatch, spectrum, fault, line):
    real, calls = gpu_init.null_space, []

    def broken(C, rank, method="auto"):
        calls.append(1)
        found = real(C, rank, method)
        basis = found.basis
        if fault == "other directions":
            basis = torch.linalg.eigh(C.double()).eigenvectors[:, -rank:]
        elif fault == "not orthonormal":
            basis = basis * 1.001
        elif fault == "random":
            basis = basis.roll(len(calls), dims=1)
        elif fault == "writes C":
            C.mul_(1.001)
        elif fault == "float32":
            basis = basis.float()
        if fault == "says less":
            return dataclasses.replace(found, eigenvalues=found.eigenvalues * 0.9)
        return dataclasses.replace(found, basis=basis, eigenvalues=(basis * (C.to(basis) @ basis)).sum(0))

    monkeypatch.setattr(gpu_init, "null_space", broken)
    monkeypatch.setattr(gpu_init, "_factors", lambda suite: [])
    monkeypatch.setattr(gpu_init, "_adapter", lambda suite: {})
    only(monkeypatch, spectrum)
    status, result = run(tmp_path, "init correctness", "init")
    assert status == 1 and "init" not in result
    assert any(re.search(line, wrong) for wrong in result["wrong"]), result["wrong"]
    assert result["wrong"][-1] == "init: not run, because init correctness found something wrong"


def test_a_wrong_factor_and_a_wrong_adapter_are_found(tmp_path, monkeypatch):
    real, only_gpu = gpu_init.thin_init, []

    def broken(weight, basis):
        only_gpu.append(1)
        A = real(weight, basis)
        return A if len(only_gpu) % 2 == 0 else A + 1e-6 * torch.randn_like(A)  # the other one is the CPU's

    monkeypatch.setattr(gpu_init, "thin_init", broken)
    made = gpu_init.compute_factors

    def scaled(model, *arguments, **options):
        factors, notes = made(model, *arguments, **options)
        return {name: A * (1 + 1e-3 * len(only_gpu)) for name, A in factors.items()}, only_gpu.append(1) or notes

    monkeypatch.setattr(gpu_init, "compute_factors", scaled)
    only(monkeypatch)
    status, result = run(tmp_path, "init correctness")
    wrong = " ".join(result["wrong"])
    assert status == 1 and all(name in wrong for name in ("outside of U", "full SVD", ": CPU: ", "init, adapter: "))


def test_what_does_not_fit_into_the_time_is_missed(tmp_path):
    status, result = run(tmp_path, "init correctness", seconds=2.0)
    assert status == 1 and result["wrong"] == []
    assert result["missed"] == [f"init: {len(gpu_init.spectra(True))} spectra", "init: factors", "init: adapter"]


def test_layers_without_time_are_extrapolated_and_said(tmp_path, monkeypatch):
    """A layer is said to take so long that one of two fits."""
    suite = make(tmp_path)
    real = gpu_init_times._measured

    def slow(suite, step):
        seconds, peak = real(suite, step)
        return (0.6 * suite.left() if step.__name__ == "one_layer" else seconds), peak

    monkeypatch.setattr(gpu_init_times, "_measured", slow)
    monkeypatch.setattr(gpu_init_times, "_official", lambda *arguments: None)
    stored = gpu_init_times.section(suite)
    assert suite.missed == ["init: 1 of 2 layers were not initialised"] and not suite.wrong
    assert "init_s, from 1 of 2 layers" in stored["extrapolated"]
    assert stored["total_s"] == pytest.approx(stored["capture_s"] + stored["init_s"])
    assert stored["goals"]["capture and initialisation, s"]["most"] == stored["total_s"]
    assert stored["goals"]["official recipe over ours"]["least"] is None


def test_decompositions_without_time_are_scaled_by_their_operations(tmp_path, monkeypatch):
    suite, took = make(tmp_path), iter([1.0, 2.0])
    monkeypatch.setattr(suite.clock, "wall_seconds", lambda step: (step(), next(took))[1])
    pieces = gpu_init_times.Pieces(suite)
    ran = []
    for key, operations in ((("svd", 4), 10.0), (("svd", 4), 10.0), (("svd", 5), 20.0), (("svd", 9), 10_000.0)):
        pieces.time(key, operations, lambda key=key: ran.append(key) or torch.zeros(()))
    assert ran == [("svd", 4), ("svd", 5)] and pieces.extrapolated == ["svd 9, by operations"]
    assert pieces.seconds == {("svd", 4): 1.0, ("svd", 5): 2.0, ("svd", 9): pytest.approx(1000.0)}
    suite.deadline = time.monotonic() + 1
    assert pieces.time(("qr", 4), 1.0, lambda: torch.zeros(())) is None and pieces.missed == ["qr 4"]


def test_goals_are_of_the_whole():
    found = gpu_init_times.goals({"total_s": 50.0, "official": {"total_s": 2000.0}})
    assert [goal.get("most", goal.get("least")) for goal in found.values()] == [50.0, 40.0]
    assert {each.d for each in gpu_init.spectra(False)} == {1024, 4096}
    assert len(gpu_init.spectra(False)) == len(gpu_init.spectra(True))
