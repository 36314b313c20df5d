"""Rows, settings, tables and observations of `kore reproduce`, on numbers that are made up."""

from __future__ import annotations

import csv
import io
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.readme_tables import reproduction_tables
from benchmarks.reproduction import summary
from kore.baselines import BASELINES as KNOWN
from kore.baselines import METHODS, Preparation, baseline
from kore.errors import ConfigError, KoreError
from kore.metrics import hars
from kore.reproduce import cell, tune
from kore.reproduce.families import FAMILIES, family, projector
from kore.reproduce.findings import rebuilt
from kore.reproduce.observations import FAILS, HOLDS, OPEN, Part, observations, overall
from kore.reproduce.settings import FIRST_STRENGTH, MOST, Setting, first_strength, search, setting_of, start, tuned_rows
from kore.reproduce.studies import (
    BASELINES,
    BY_ID,
    DATA,
    GENERAL,
    KORE,
    LLAVA,
    LORA_RANK,
    QWEN,
    ROWS,
    SPECIFIC,
    TABLES,
    plain,
    quick_rows,
    rows_of,
)
from kore.reproduce.tables import Results, all_tables, ranking
from kore.reproduce.tasks import Task, run_tasks
from kore.reproduce.world.new import TYPES
from kore.reproduce.world.old import DIMENSIONS, TASKS
from kore.statistics import Interval


def test_rows_are_unique_known_and_in_a_table() -> None:
    assert len(BY_ID) == len(ROWS)
    labels = [(row.family, row.label) for row in ROWS]
    assert len(set(labels)) == len(labels)
    for row in ROWS:
        assert row.tables and set(row.tables) <= set(TABLES)
        assert row.family in FAMILIES and row.data in DATA and row.merge in ("raw", "balanced")
        assert set(row.groups) <= set(DIMENSIONS)
        assert row.method in METHODS
        baseline(row.method, **row.options)
        assert row.tuned_id in BY_ID and BY_ID[row.tuned_id].tuned_id == row.tuned_id
    assert all(rows_of(name) for name in TABLES)
    with pytest.raises(KeyError):
        rows_of("none")


def test_every_baseline_is_there_as_the_paper_ran_it_on_the_same_data_and_on_both_families() -> None:
    assert BASELINES == ("full", "lora", "replay", "ewc", "lwf", "moelora", "o-lora", "sefe", "cia")
    for name in BASELINES:
        assert BY_ID[f"{LLAVA}/{plain(name)}"].data == "plain"
        for kind in (LLAVA, QWEN):
            assert BY_ID[f"{kind}/{name}"].data == "augmented"
    assert {row.family for row in quick_rows()} == {LLAVA, QWEN}
    assert {"full", "lora", KORE} <= {row.name for row in quick_rows()}


def _trained(name: str, row) -> int:
    """Parameters that the row's method trains beside the projector, on a model of the family with new weights."""
    kind = family(name)
    model = kind.model(kind.tokenizer(["What is this animal?"])).eval()
    if row.method in ("kore", "random-a"):
        row_method, rank = baseline("random-a"), row.rank
    else:
        row_method, rank = baseline(row.method, **row.options), row.rank
    made = row_method.prepare(model, Preparation(rank=rank, train_a=row.train_a, progress=False))
    beside = sum(p.numel() for p in projector(model).parameters() if p.requires_grad)
    return sum(p.numel() for p in made.parameters() if p.requires_grad) - beside


@pytest.mark.parametrize("name", list(FAMILIES))
def test_budgets_are_equal_and_far_below_full(name: str) -> None:
    rows = {row.name: row for row in ROWS if row.family == name}
    lora, full = _trained(name, rows["lora"]), _trained(name, rows["full"])
    assert lora < full / 5
    for each in (KORE, "moelora", "o-lora", "cia"):
        assert 0.95 < _trained(name, rows[each]) / lora <= 1.0, each
    for row in rows.values():
        assert row.rank in (None, f"match-lora-{LORA_RANK}") or "rank" in row.tables


def test_the_search_measures_exactly_as_many_settings_for_every_row() -> None:
    for begin, peak in ((Setting(1), 1), (Setting(1), 4), (Setting(1, 0), 1), (Setting(-1, 0), 2)):
        asked: list[Setting] = []

        def measure(settings: list[Setting], peak: int = peak, asked: list[Setting] = asked) -> list[float]:
            asked += settings
            return [-((each.rate - peak) ** 2) - (each.strength or 0) ** 2 for each in settings]

        best = search(begin, measure)
        assert len(asked) == len(set(asked)) == MOST
        assert best == max(asked, key=lambda each: -((each.rate - peak) ** 2) - (each.strength or 0) ** 2)
    assert search(Setting(1), lambda settings: [-abs(each.rate - 3.2) for each in settings]) == Setting(3)


def test_settings_are_the_stated_grid_and_say_whether_they_were_tuned(tmp_path: Path) -> None:
    row = BY_ID[f"{LLAVA}/ewc"]
    assert Setting(2, 1).learning_rate == 0.004
    assert Setting(2, 1).strength_of(row) == 4 * FIRST_STRENGTH["ewc"]
    assert Setting(2, None).strength_of(BY_ID[f"{LLAVA}/lora"]) is None
    for each in ROWS:
        known = "strength" in KNOWN[each.method].Options.model_fields
        assert (first_strength(each) is not None) == (known or each.two_sided)
    file = tmp_path / "tuned.json"
    assert setting_of(row, file) == start(row) and not setting_of(row, file).tuned
    found = {"identity": row.identity(), "chosen": {"rate": 5, "strength": -1}}
    file.write_text(json.dumps({"rows": {row.id: found}}))
    assert setting_of(row, file) == Setting(5, -1, True)
    found["identity"]["options"] = {"samples": 1}
    file.write_text(json.dumps({"rows": {row.id: found}}) + " ")
    assert not setting_of(row, file).tuned
    assert BY_ID[f"{LLAVA}/kore-ocr"].tuned_id == f"{LLAVA}/{KORE}"


def test_tuning_measures_every_row_alike_and_keeps_all_numbers(tmp_path: Path) -> None:
    worlds = {name: [SimpleNamespace(world=100, about={"sha256": "x"})] for name in (LLAVA, QWEN)}
    asked: list[cell.Job] = []

    def fake(job: cell.Job) -> dict:
        asked.append(job)
        avg = 50.0 - abs(job.setting.rate - 2)
        return {"ka": avg, "kr": avg, "avg": avg}

    said: list[str] = []
    file = tmp_path / "tuned.json"
    tuning = tune.Tuning(tmp_path, worlds, ThreadPoolExecutor(2), cell.FULL, file, said.append, fake)  # type: ignore[arg-type]
    rows = [BY_ID[f"{LLAVA}/lora"], BY_ID[f"{QWEN}/ewc"]]
    for row in rows:
        assert tuning.row(row).rate == 2
        assert setting_of(row, file).tuned
    assert len(asked) == len(said) == 2 * MOST and {job.split for job in asked} == {"validation"}
    assert len({job.directory for job in asked}) == len(asked)
    found = json.loads(file.read_text())
    assert set(found["rows"]) == {row.id for row in rows} and found["most"] == MOST
    assert all(len(each["measured"]) == MOST for each in found["rows"].values())
    assert len(tuned_rows()) == len({row.tuned_id for row in ROWS})


def _cell(rng, row, ka: float, kr: float) -> dict:
    tasks = dict(zip(TASKS, rng.uniform(10, 90, len(TASKS))))
    return {
        "key": {"learning_rate": 0.01, "strength": None},
        "tuned": row.method != "cia",
        "trainable": {8: 1, 16: 2, 60: 9}.get(row.rank, 5),
        "ka": ka,
        "kr": kr,
        "avg": (ka + kr) / 2,
        "cem": ka + 1,
        "f1": ka - 1,
        "types": dict.fromkeys(TYPES, ka),
        "tasks": tasks,
        "dimensions": dict.fromkeys(DIMENSIONS, kr),
    }


def _results(ka, kr, worlds=(0, 1, 2), noise: float = 0.1, findings: bool = True) -> Results:
    rng, found = np.random.default_rng(0), Results()
    for row in ROWS:
        found.cells[row.id] = {
            world: _cell(rng, row, ka(row) + noise * rng.normal(), kr(row) + noise * rng.normal()) for world in worlds
        }
    cuts = ("0.125", "0.25", "0.5", "0.75")
    for name in (LLAVA, QWEN):
        found.before[name] = {world: _cell(rng, BY_ID[f"{LLAVA}/lora"], 5.0, 60.0) for world in worlds}
    for world in worlds if findings else ():
        found.before[LLAVA][world]["findings"] = {
            "reconstruction": {
                method: {cut: height + rng.normal() * 0.1 for cut in cuts}
                for method, height in (("svd", 20.0), ("asvd", 30.0), ("co-svd", 40.0))
            },
            "similarity": {"within": 0.9 + 0.01 * rng.normal(), "across": 0.5},
        }
    return found


def _as_the_paper_says(row) -> float:
    if row.name.startswith("kore-rank-") or (row.name == KORE and row.family == LLAVA):
        size = {"kore-rank-8": 31.0, "kore-rank-16": 33.0, KORE: 35.0, "kore-rank-60": 37.0}
        return size[row.name]
    if row.name in ("kore-no-constraint", KORE):
        return 35.0
    return 14.0


def _kept(row) -> float:
    sizes = {"kore-rank-8": 41.0, "kore-rank-16": 42.0, KORE: 43.0, "kore-rank-60": 44.0}
    return sizes.get(row.name, 47.0 if row.name.removeprefix("kore-") in SPECIFIC else 36.0)


def test_where_the_numbers_are_as_in_the_paper_all_claims_hold_but_that_on_a_larger_model() -> None:
    results = _results(_as_the_paper_says, _kept)
    for row in results.cells[f"{LLAVA}/lora-plain"].values():
        row["tasks"] = dict.fromkeys(TASKS, 5.0)
    for row in results.cells[f"{LLAVA}/lora"].values():
        row["tasks"] = dict.fromkeys(TASKS, 5.0)
    claims = {claim.name: claim for claim in observations(results)}
    assert list(claims) == [*map(str, range(1, 12)), "F1", "F2"]
    verdicts = {name: claim.verdict for name, claim in claims.items()}
    assert {name for name, verdict in verdicts.items() if verdict != HOLDS} == {"7"}
    assert verdicts["7"] == OPEN
    for name in "12345":
        assert overall(claims[name].like_for_like) == HOLDS
    json.dumps([claim.as_json() for claim in claims.values()])


def test_where_the_opposite_is_measured_claims_do_not_hold() -> None:
    results = _results(lambda row: 40 - _as_the_paper_says(row), lambda row: 80 - _kept(row))
    verdicts = {claim.name: claim.verdict for claim in observations(results)}
    for name in ("1", "2", "3", "5", "6", "8", "9", "10", "11"):
        assert verdicts[name] == FAILS, name


@pytest.mark.parametrize(("worlds", "noise"), [((0,), 0.1), ((0, 1, 2), 60.0), ((), 0.0)])
def test_one_world_noise_or_nothing_tells_nothing(worlds, noise: float) -> None:
    results = _results(lambda row: 200.0, lambda row: 200.0, worlds, noise, findings=False)
    verdicts = {claim.name: claim.verdict for claim in observations(results)}
    if len(worlds) < 2:
        assert set(verdicts.values()) == {OPEN}
    assert verdicts["F1"] == verdicts["F2"] == verdicts["7"] == OPEN
    assert HOLDS not in {verdicts["1"], verdicts["2"], verdicts["3"]}


def test_a_part_is_judged_by_its_interval_and_a_claim_by_its_worst_part() -> None:
    above, below, both = Part("", Interval(2, 1, 3)), Part("", Interval(-2, -3, -1)), Part("", Interval(1, -1, 3))
    assert [part.verdict for part in (above, below, both, Part("", Interval(9)), Part("", None))] == [
        HOLDS, FAILS, OPEN, OPEN, OPEN]  # fmt: skip
    assert overall([above, above]) == HOLDS and overall([]) == OPEN
    assert overall([above, both]) == OPEN and overall([above, both, below]) == FAILS


def test_tables_are_means_intervals_and_paired_leads() -> None:
    results = _results(_as_the_paper_says, _kept, noise=2.0)
    tables = all_tables(results)
    assert set(tables) == set(TABLES) - {"losses", "cases"}
    line = next(line for line in tables["main"].lines if line.row == f"{LLAVA}/lora")
    cells, kore = results.cells[line.row], results.cells[f"{LLAVA}/{KORE}"]
    ka = np.array([cells[world]["ka"] for world in (0, 1, 2)])
    half = stats.t.ppf(0.975, 2) * ka.std(ddof=1) / math.sqrt(3)
    assert line.values["K.A"].value == pytest.approx(ka.mean(), rel=1e-14)
    assert line.values["K.A"].low == pytest.approx(ka.mean() - half, rel=1e-12)
    both = [
        [hars(each[w]["ka"], each[w]["kr"], results.before[LLAVA][w]["ka"], results.before[LLAVA][w]["kr"])
         for w in (0, 1, 2)]
        for each in (cells, kore)
    ]  # fmt: skip
    assert line.values["HARS"].value == pytest.approx(np.mean(both[0]), rel=1e-14)
    d = np.array(both[0]) - np.array(both[1])
    lead = line.values["HARS lead"]
    assert lead.value == pytest.approx(d.mean(), rel=1e-12)
    assert lead.high == pytest.approx(d.mean() + stats.t.ppf(0.975, 2) * d.std(ddof=1) / math.sqrt(3), rel=1e-12)
    assert next(line for line in tables["main"].lines if line.row == f"{LLAVA}/{KORE}").values["Avg lead"] is None
    assert [line.tuned for line in tables["main"].lines if line.label.startswith("CIA")] == [False, False]
    order = ranking(results)
    assert [value for _, value in order] == sorted((value for _, value in order), reverse=True)
    assert len(order) == len(rows_of("main"))


def test_tables_as_csv_and_json_hold_every_number() -> None:
    table = all_tables(_results(_as_the_paper_says, _kept))["rank"]
    rows = list(csv.DictReader(io.StringIO(table.as_csv())))
    assert [row["label"] for row in rows] == [line.label for line in table.lines]
    for row, line in zip(rows, table.lines):
        for column in table.columns:
            value = line.values.get(column)
            assert row[column] == ("" if value is None else str(value.value))
            assert row[f"{column} high"] == ("" if value is None else str(value.high))
    assert (
        json.loads(json.dumps(table.as_json()))["lines"][1]["values"]["K.A"]["value"]
        == table.lines[1].values["K.A"].value
    )


def test_what_is_stored_and_shown_of_a_reproduction() -> None:
    results = _results(_as_the_paper_says, _kept)
    values = {
        **dict(scale="mini", quick=False, worlds=[0, 1, 2], budget=vars(cell.FULL), tuned={}, seconds=1.0),
        "environment": {"processor": "a processor", "torch": "2", "commit": "0123456789"},
        "tables": {name: table.as_json() for name, table in all_tables(results).items()},
        "observations": [claim.as_json() for claim in observations(results)],
        "cells": {row: [{"core_seconds": {"train": 1.5}} for _ in cells] for row, cells in results.cells.items()},
    }
    stored = json.loads(json.dumps(summary(values)))
    assert stored["cells"] == 3 * len(ROWS) and stored["core_seconds_of_cells"] == round(4.5 * len(ROWS))
    for measure in ("Avg", "HARS"):
        assert [BY_ID[row].label for row in stored["ranks"]["main"][measure]] == [
            label for label, _ in ranking(results, measure=measure.lower())
        ]
    assert stored["observations"][0]["parts"] == {HOLDS: 2 * len(BASELINES) + 1}
    text = reproduction_tables(stored)
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines() if line.startswith("| ")}
    labels = {row.label + " †" * (row.method == "cia") for row in rows_of("main")}
    assert set(rows) - {"method", "untouched model"} == labels
    kore = next(line for line in stored["tables"]["main"] if line["row"] == f"{LLAVA}/{KORE}")["values"]["K.A"]
    assert rows["KORE"][1] == f"{kore[0]:.1f} ± {(kore[2] - kore[1]) / 2:.1f}"
    assert rows["LoRA"][5] == "–" != rows["LoRA, same data"][5]
    assert "LLaVA, of 21 rows: KORE 1 and 1;" in text and "Qwen2.5-VL, of 12 rows:" in text
    assert "**cannot be told**: " in text and text.endswith("7 (not measured).")


def test_rows_without_cells_are_named_as_missing() -> None:
    results = _results(_as_the_paper_says, _kept)
    del results.cells[f"{LLAVA}/moelora"]
    table = all_tables(results)["main"]
    assert table.missing == ("MoELoRA, same data",)


def test_a_rebuilt_weight_is_the_best_of_its_rank_for_what_each_method_looks_at() -> None:
    rng = torch.Generator().manual_seed(0)
    W = torch.randn(8, 12, generator=rng, dtype=torch.float64)
    x = torch.randn(100, 12, generator=rng, dtype=torch.float64) * torch.logspace(0, 2, 12, dtype=torch.float64)
    C = x.T @ x
    for method in ("svd", "asvd", "co-svd"):
        kept = rebuilt(W, C, method, 0.5)
        assert torch.linalg.matrix_rank(kept) == 4
        assert torch.allclose(rebuilt(W, C, method, 0.0), W)
    error = {method: float(((W - rebuilt(W, C, method, 0.5)) @ C).norm()) for method in ("svd", "asvd", "co-svd")}
    assert error["co-svd"] < error["asvd"] < error["svd"]
    weight = {method: float((W - rebuilt(W, C, method, 0.5)).norm()) for method in ("svd", "co-svd")}
    assert weight["svd"] < weight["co-svd"]


def _work(value: int, *taken: int) -> int:
    if value < 0:
        raise KoreError("a bad\nvalue")
    return value + sum(taken)


def test_tasks_follow_what_they_need_and_a_failure_stops_no_other() -> None:
    tasks = [
        Task("a", _work, (1,)),
        Task("bad", _work, (-1,)),
        Task("after-bad", _work, (5,), needs=("bad",)),
        Task("b", _work, (10,), takes=("a",)),
        Task("c", _work, (100,), needs=("a",), takes=("b", "a")),
    ]
    said: list[str] = []
    outcome = run_tasks(tasks, ThreadPoolExecutor(2), 2, said.append)
    assert outcome.results == {"a": 1, "b": 11, "c": 112}
    assert outcome.failures == {"bad": "KoreError: a bad"}
    assert said[0].startswith("5 pieces of work") and len(said) == 5
    assert all("left" in line for line in said[1:])


def test_unknown_rows_are_refused(tmp_path: Path) -> None:
    from kore.reproduce.run import run

    with pytest.raises(ConfigError, match=r"rows: expected names out of .*llava/lora.*, got 'lora'"):
        run(tmp_path, rows=["lora"])
    with pytest.raises(KoreError, match="rows: expected names"):
        tune.tune(tmp_path, rows=["llava/kore-ocr"])
    assert len(GENERAL) == 3
