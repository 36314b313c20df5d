"""The CPU suite's LoRA parts on tiny shapes, and the README's table that is made of them."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import cpu_suite, readme_tables
from kore.bench.init import OFFICIAL
from kore.bench.init import OURS as OURS_INIT
from kore.bench.llava import TINY
from kore.bench.lora_layers import Case
from kore.bench.lora_peers import FROZEN, GROUP, OURS, PEFT
from kore.bench.step_peers import LlamaShape


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    output = tmp_path_factory.mktemp("suite") / "cpu.json"
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler")  # compiling takes its time
        layers = [Case(32, d_out, 16, 5, torch.float32) for d_out in ((24,), (24, 24))]
        patch.setattr(cpu_suite, "LAYERS", layers)
        patch.setattr(cpu_suite, "STACK", LlamaShape(1, 64, 96, 2, 64))
        patch.setattr(cpu_suite, "RANK", 6)
        patch.setattr(cpu_suite, "LORA_RANK", 3)
        patch.setattr(cpu_suite, "INIT_LAYER", (48, 80, 6))
        patch.setattr(cpu_suite, "INIT_COVARIANCE", (64, 8))
        patch.setattr(cpu_suite, "INIT_MODEL", (TINY, 3, 6))
        words = ["--only", "lora", "step", "init", "--output", str(output), "--rounds", "3", "--threads", "1"]
        patch.setattr(sys, "argv", ["cpu_suite", *words])
        cpu_suite.main()
    torch.set_num_threads(threads)
    return json.loads(output.read_text())


def test_every_part_is_stored_with_where_it_was_made_and_its_goals(stored):
    assert set(stored) == {"lora", "step", "init"}
    for part in stored.values():
        assert part["environment"]["commit"] and part["machine"] == {"device": "cpu", "threads": 1} and part["backends"]
    for case, goals in zip(stored["lora"]["cases"], stored["lora"]["goals"], strict=True):
        ours, peft = (case["contenders"][name] for name in (OURS, PEFT))
        assert goals["over_frozen"] == {"goal": ours["floor"] + 0.06, "found": ours["over_frozen"]["median"]}
        assert goals["PEFT over ours"] == {"goal": 1.0, "found": peft["ours_is_faster"]["median"]}
    assert "C++ compiler" in stored["lora"]["left_out"]["PEFT, A frozen, compiled"]
    assert stored["step"]["rounds"] == 3 and stored["step"]["rank"] == 6


def test_the_table_has_every_contender_and_model(stored, monkeypatch):
    monkeypatch.setattr(readme_tables, "_load", lambda name: stored)
    made = readme_tables.lora()
    heads = made.splitlines()[0]
    assert GROUP in heads and FROZEN not in heads
    rows = {line.split(" | ")[0]: line for line in made.splitlines()}
    single, pair = rows["| 32→24"], rows["| 32→24 ×2"]
    ratio = stored["lora"]["cases"][0]["contenders"][OURS]["over_frozen"]["median"]
    assert f" {ratio:.3f} " in single and " – " in single and " – " not in pair
    for name, row in stored["step"]["contenders"].items():
        assert f"| {name} | {row['over_frozen']['median']:.2f} × | {row['tokens_per_second']:.0f} |" in made


def test_the_initialisation_is_stored_and_shown(stored, monkeypatch):
    monkeypatch.setattr(readme_tables, "_load", lambda name: stored)
    found = stored["init"]
    assert set(found["model"]["null_spaces"]) == {"q_proj", "o_proj", "gate_proj", "down_proj"}
    assert [found[name]["rounds"] for name in ("layer", "covariance", "model")] == [3, 3, 3]
    rows = readme_tables.init().splitlines()[2:5]
    for row, name in zip(rows, ("layer", "covariance", "model"), strict=True):
        faster = found[name]["ours_is_faster"][OFFICIAL]["median"]
        assert found["goals"][name] == {"goal": 10.0, "found": faster} and f"| {faster:.2f} × (" in row
        assert row.count("|") == readme_tables.init().splitlines()[0].count("|")
        worst = max(space["energy_ratio"][OURS_INIT] for space in found[name]["null_spaces"].values())
        assert worst <= 1.02 and f"| {worst:.4f} |" in row


def test_a_marker_gets_its_table_and_an_unknown_or_open_one_is_told(stored, monkeypatch):
    monkeypatch.setattr(readme_tables, "_load", lambda name: stored)
    text = readme_tables.rewritten("a\n<!-- table:lora -->\nold\n<!-- /table -->\nz\n")
    assert text == f"a\n<!-- table:lora -->\n{readme_tables.lora()}\n<!-- /table -->\nz\n"
    for wrong in ("<!-- table:lore -->\n<!-- /table -->\n", "<!-- table:lora -->\n"):
        with pytest.raises(SystemExit, match=r"README\.md: expected"):
            readme_tables.rewritten(wrong)
