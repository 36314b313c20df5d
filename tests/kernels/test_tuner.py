"""The offline tuner, with made-up timings: what it picks, and what it does to the tables."""

from __future__ import annotations

import math
import runpy
import shutil
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import tune_covariance as tuner
from kore_kernels.covariance_update import configs
from kore_kernels.covariance_update.configs import TritonConfig


def accept_all(table: str, family: int, config: TritonConfig) -> bool:
    return True


def prefer_small_tiles(table: str, family: int, config: TritonConfig) -> float:
    return config.block_i * config.block_j + config.block_n + config.num_stages + config.num_warps + config.group


@pytest.mark.parametrize("table", list(tuner.TABLES))
def test_every_frozen_configuration_is_a_candidate_of_its_own_search(table):
    for frozen in getattr(configs, table).values():
        found = list(tuner.candidates(frozen))
        assert found[0] == frozen and len(set(found)) == len(found) > 100


def test_the_fastest_that_the_audit_accepts_wins():
    def no_small_tiles(table, family, config):
        return config.block_i >= 128

    best, time, before = tuner.tune("AS_IS", 90, no_small_tiles, prefer_small_tiles)
    assert (best.block_i, best.block_j, best.block_n, best.num_stages) == (128, 128, 16, 3)
    assert time == prefer_small_tiles("AS_IS", 90, best) < before


def test_a_wrong_result_or_an_even_time_changes_nothing():
    for time in (math.inf, 1.0):
        frozen = configs.AS_IS_TMA[90]

        def measure(table, family, config, time=time, frozen=frozen):
            return 1.0 if config == frozen else time

        assert tuner.tune("AS_IS_TMA", 90, accept_all, measure)[0] == frozen


@pytest.mark.parametrize(("table", "family"), [("AS_IS_TMA", 100), ("AS_IS", 80), ("IN_PIECES", 90)])
def test_rewrites_one_entry_of_a_copy(tmp_path, table, family):
    copy = tmp_path / "configs.py"
    shutil.copy(configs.__file__, copy)
    best, _, _ = tuner.tune(table, family, accept_all, prefer_small_tiles)
    tuner.rewrite(copy, table, family, best)
    before, after = Path(configs.__file__).read_text().splitlines(), copy.read_text().splitlines()
    assert [new != old for old, new in zip(before, after)].count(True) == 1 and len(before) == len(after)
    assert astuple(runpy.run_path(str(copy))[table][family]) == astuple(best)
    with pytest.raises(ValueError, match="has no"):
        tuner.rewrite(copy, table, 75, best)


def test_says_that_it_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(tuner.torch.cuda, "is_available", lambda: False)
    assert tuner.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_the_audit_is_asked_about_the_candidate():
    code = (
        "from benchmarks import tune_covariance as t; from kore_kernels.covariance_update import configs as c;"
        "print(t.accepted('AS_IS', 80, c.AS_IS[80]),"
        " t.accepted('AS_IS', 80, c.TritonConfig(128, 128, 64, 4, 4, 1)), c.AS_IS[80].num_warps)"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.stdout.split() == ["True", "False", "8"], result.stderr
