"""The CPU suite's LoRA parts on tiny shapes, and the README's table that is made of them."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import cpu_suite, readme_tables
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
        words = ["--only", "lora", "step", "--output", str(output), "--rounds", "3", "--threads", "1"]
        patch.setattr(sys, "argv", ["cpu_suite", *words])
        cpu_suite.main()
    torch.set_num_threads(threads)
    return json.loads(output.read_text())


def test_every_part_is_stored_with_where_it_was_made_and_its_goals(stored):
    assert set(stored) == {"lora", "step"}
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


def test_a_marker_gets_its_table_and_an_unknown_or_open_one_is_told(stored, monkeypatch):
    monkeypatch.setattr(readme_tables, "_load", lambda name: stored)
    text = readme_tables.rewritten("a\n<!-- table:lora -->\nold\n<!-- /table -->\nz\n")
    assert text == f"a\n<!-- table:lora -->\n{readme_tables.lora()}\n<!-- /table -->\nz\n"
    for wrong in ("<!-- table:lore -->\n<!-- /table -->\n", "<!-- table:lora -->\n"):
        with pytest.raises(SystemExit, match=r"README\.md: expected"):
            readme_tables.rewritten(wrong)
