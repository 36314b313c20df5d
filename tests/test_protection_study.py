"""The protection study: its search, what is frozen before the test worlds, its sums and its table. Cells are stubs."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import protection, readme_tables
from benchmarks.protection import Study, interval, search, summary
from benchmarks.protection_cells import VARIANTS, Job, Setting, Variant, finished, merged, run
from kore.covariance import CovarianceSet, Group
from kore.demo.methods import QUICK, tuned_learning_rates
from kore.errors import KoreError


def test_the_search_measures_all_neighbours_of_the_best():
    asked = []

    def measure(settings):
        asked.extend(settings)
        return [-((each.rate - 5) ** 2) - (each.strength - 1) ** 2 for each in settings]

    assert search(Setting(3, 0), measure, most=99) == Setting(5, 1)
    assert set(Setting(5, 1).neighbours()) <= set(asked)
    assert len(asked) == len(set(asked))
    asked.clear()
    search(Setting(3, 0), measure, most=6)
    assert len(asked) == 6
    assert asked[:3] == [Setting(3, 0), Setting(3, 1), Setting(3, -1)]
    assert search(Setting(0), lambda settings: [float(each.rate) for each in settings], most=4) == Setting(2)


def test_settings_are_the_stated_grid():
    assert Setting(6).learning_rate == 0.064 and Setting(6).penalty is None
    assert [each.penalty for each in Setting(0, 3).neighbours()] == [512, 32, 128, 128]


def fake_cell(job: Job):
    """Best at 0.032 and λ = 128; worse in the second test world."""
    distance = abs(job.setting.rate - 5) + abs((job.setting.strength or 3) - 3) + 3 * job.seed
    return {"ka": 60.0 - distance, "kr": 80.0, "avg": 70 - distance / 2, "trainable": 7, "train_seconds": 1.0}


def study(directory, monkeypatch):
    where = dict(processor="one", torch="2", commit="abc")
    monkeypatch.setattr(protection, "environment", lambda: where)
    made = Study(directory, directory / "out.json", QUICK, ThreadPoolExecutor(2), most=9, runner=fake_cell)
    made.inputs = {world: SimpleNamespace(checkpoint_sha256="") for world in (101, 1, 2)}
    made.before = {world: {"ka": 5.0, "kr": 95.0, "avg": 50.0} for world in made.inputs}
    return made


def test_a_variant_is_searched_on_the_validation_world_then_frozen(tmp_path, monkeypatch):
    made = study(tmp_path, monkeypatch)
    made.variant("two-sided", VARIANTS["two-sided"])
    made.variant("balanced", VARIANTS["balanced"])
    results = json.loads((tmp_path / "out.json").read_text())
    found = results["variants"]["two-sided"]
    assert {row["world"] for row in found["validation"]} == {101}
    assert found["chosen"] == {"learning_rate": 0.032, "penalty": 128}
    assert [row["world"] for row in found["test"]] == [1, 2]
    assert {(row["learning_rate"], row["penalty"]) for row in found["test"]} == {(0.032, 128)}
    kept = results["variants"]["balanced"]
    assert kept["validation"] == [] and kept["chosen"]["learning_rate"] == tuned_learning_rates()["kore"]
    assert readme_tables.protection_table(results).count("\n| ") == 2


def test_collecting_leaves_unfinished_tests_out_but_no_search(tmp_path, monkeypatch):
    made = study(tmp_path, monkeypatch)
    made.runner = lambda job: fake_cell(job) if job.world != 2 else None
    made.variant("two-sided", VARIANTS["two-sided"])
    assert [row["world"] for row in made.found["two-sided"]["test"]] == [1]
    made.runner = lambda job: None
    with pytest.raises(KoreError, match="not finished"):
        made.variant("two-sided", VARIANTS["two-sided"])


def test_a_finished_cell_is_read_and_another_setting_is_not(tmp_path, monkeypatch):
    inputs = SimpleNamespace(checkpoint=tmp_path, checkpoint_sha256="abc")
    job = Job(VARIANTS["raw"], Setting(6), inputs, 1, 0, QUICK, tmp_path, tmp_path / "cell")
    (tmp_path / "cell").mkdir()
    stored = {"key": job.key(), "avg": 1.0}
    (tmp_path / "cell" / "cell.json").write_text(json.dumps(stored))
    assert run(job) == finished(job) == stored
    other = Variant("any", merge="tokens")
    for changed in (replace(job, setting=Setting(5)), replace(job, seed=1), replace(job, variant=other)):
        assert changed.key() != job.key() and finished(changed) is None
        with pytest.raises(Exception, match=str(tmp_path)):  # goes on, and finds no tokenizer there
            run(changed)


def test_groups_are_added_as_the_variant_says(tmp_path):
    matrices = [torch.diag(torch.tensor([8.0, 0.0])), torch.diag(torch.tensor([1.0, 1.0]))]
    for name, C, tokens in zip(("a", "b"), matrices, (4, 1)):
        group = Group("layer", ("layer",), 2, tokens)
        CovarianceSet({"layer": C}, [group], {}).save(tmp_path / "covariance" / name)
    expected = {"raw": [9, 1], "tokens": [3, 1], "balanced": [7.5, 2.5]}
    for merge, diagonal in expected.items():
        assert merged(tmp_path, "covariance", merge)["layer"].diagonal().tolist() == pytest.approx(diagonal)


def test_every_variant_is_one_that_kore_can_make():
    import kore

    for variant in VARIANTS.values():
        assert variant.method in kore.baselines.METHODS
        if variant.method == "kore":
            kore.KoreConfig(**{"rank": 4, **variant.config})


def test_leads_are_paired_by_world_with_students_interval():
    assert interval([1.0, 3.0]) == {"mean": 2.0, "half": pytest.approx(12.706, abs=1e-3)}
    assert interval([4.0]) == {"mean": 4.0, "half": None}

    def found(values):
        rows = [{"world": world, "ka": v, "kr": v, "avg": v, "hars": v} for world, v in values.items()]
        chosen = {"learning_rate": 0.1, "penalty": None}
        return {"label": "", "trained_parameters": 1, "chosen": chosen, "test": rows}

    rows = summary({"variants": {"raw": found({1: 12.0, 2: 25.0, 3: 7.0}), "balanced": found({1: 10.0, 2: 20.0})}})
    assert rows[0]["Avg lead"]["mean"] == pytest.approx(3.5)  # the third world has no partner
    assert "Avg lead" not in rows[1]
