"""The README's Python example is run as it stands, on a small saved LLaVA."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs_and_its_adapter_loads_in_stock_peft(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    monkeypatch.chdir(tmp_path)
    tiny.save_tiny("llava", "my-llava")
    tiny.tiny_conversations("data", 6)
    Path("data/conversations.json").rename("data/old.json")
    tiny.tiny_conversations("data", 6)
    Path("data/conversations.json").rename("data/new.json")
    exec(compile(example, "README.md", "exec"), {})

    from peft import PeftModel
    from transformers import LlavaForConditionalGeneration

    adapters = list(Path("out").rglob("adapter_model.safetensors"))
    assert adapters
    PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained("my-llava"), str(adapters[0].parent))


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http|#)([^)#]+)", README))
def test_links_lead_to_files(link):
    assert (ROOT / link).exists()


def test_tables_are_those_of_the_stored_results():
    from benchmarks.readme_tables import rewritten

    assert rewritten(README) == README
