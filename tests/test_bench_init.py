"""``kore bench init``: the gate before the clock, and the command."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch

from kore.bench import init, init_cases
from kore.bench.check import InaccurateError
from kore.bench.llava import TINY
from kore.cli.main import main


def test_the_recipe_and_ours_find_the_same_factors_where_float32_suffices():
    plan = init.Plan(width=48, inner=80, rank=6, rounds=1, condition=10.0)
    covariances = {name: init.graded_covariance(d, 10.0, 1) for name, d in plan.inputs().items()}
    weights = {name: torch.randn(d_out, plan.inputs()[reads]) for name, (reads, d_out) in plan.layers().items()}
    ours = init._ours(plan, covariances, weights, "eigh")
    official = init._official(plan, covariances, weights)
    assert len(ours) == len(official) == 7
    for a, b in zip(ours, official):
        torch.testing.assert_close(a.mT @ a, (b.mT @ b).double(), rtol=0, atol=2e-2 * float((a.mT @ a).abs().max()))


def test_covariances_are_as_graded_as_they_say():
    eigenvalues = torch.linalg.eigvalsh(init.graded_covariance(64, 1e4, 0).double())
    assert float(eigenvalues[0]) > 0 and 1e4 < float(eigenvalues[-1] / eigenvalues[0]) < 1e9


def test_nothing_is_timed_with_a_wrong_null_space(monkeypatch):
    def wrong(C, rank, method="auto"):
        ns = solve(C, rank, "eigh")
        return init.NullSpace(ns.basis.flip(0), *list(vars(ns).values())[1:])

    solve = init.null_space
    monkeypatch.setattr(init, "null_space", wrong)
    with pytest.raises(InaccurateError, match="energy ratio"):
        init.run(init.Plan(width=48, inner=80, rank=6, rounds=1), torch.device("cpu"))


def test_command(tmp_path, capsys):
    target = tmp_path / "new" / "init.json"
    assert main(["bench", "init", "--quick", "--device", "cpu", "--rounds", "2", "--json", str(target)]) == 0
    shown, stored = capsys.readouterr().out, json.loads(target.read_text())
    assert "official recipe" in shown and stored["rounds"] == 2
    assert stored["ours_is_faster"][init.OFFICIAL]["median"] > 0
    assert all(found["energy_ratio"][init.OURS] <= 1.02 for found in stored["null_spaces"].values())
    assert main(["bench", "init", "--rank", "99", "--quick"]) == 2
    assert "expected at most d = 96" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["covariance", "model"])
def test_other_cases(case, tmp_path, capsys):
    target = tmp_path / "init.json"
    words = ["bench", "init", "--quick", "--device", "cpu", "--rounds", "1", "--json", str(target), "--case", case]
    assert main(words) == 0
    shown, stored = capsys.readouterr().out, json.loads(target.read_text())
    assert stored["case"] == case and stored["rank"] == 12 and "official recipe" in shown
    assert ("eigh in float32" in shown) == (case == "covariance") and ("capture of 160 tokens" in shown) == (
        case == "model"
    )
    assert main(["bench", "init", "--quick", "--case", "model", "--width", "8"]) == 2
    assert main(["bench", "init", "--quick", "--case", "linear"]) == 2


def test_a_whole_model_ends_as_it_began_and_is_not_timed_with_a_wrong_null_space(monkeypatch):
    model = init_cases.random_llava(TINY, torch.device("cpu"), torch.float32)
    names, before = [name for name, _ in model.named_modules()], {k: v.clone() for k, v in model.state_dict().items()}
    monkeypatch.setattr(init_cases, "random_llava", lambda *arguments: model)
    plan = init_cases.ModelPlan(TINY, 3, 6, 2)
    found = init_cases.run_model(plan, torch.device("cpu"))
    assert found["rounds"] == 2 and [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    solve = init_cases.null_space
    monkeypatch.setattr(
        init_cases, "null_space", lambda C, *rest: dataclasses.replace(f := solve(C, *rest), basis=f.basis.flip(0))
    )
    with pytest.raises(InaccurateError, match="energy ratio"):
        init_cases.run_model(plan, torch.device("cpu"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_initialising_a_layer_takes_less_than_three_of_its_largest_covariance():
    from benchmarks.init_memory import GOAL, measured

    found = measured(512, 1408, 24, threads=1)
    assert 1.5 < found["of_widest_covariance"] <= GOAL, found
