"""What a run's report says of each layer: true changes and bounds, the worst first, and never a failed run."""

from __future__ import annotations

import re

import pytest
import torch

import kore
from kore.analysis.adapters import read_updates
from kore.models import named_linears
from kore.pipeline import report_layers
from kore.pipeline.report import _changes
from kore.report import Report
from tests.batches import MODELS, make_batches


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The files of a finished run, as far as the section reads them; the first layer's k_proj has learned most."""
    out = tmp_path_factory.mktemp("run")
    cov = kore.capture_covariance(MODELS["llama"](), make_batches("llama"), progress=False)
    cov.save(out / "covariance")
    model = kore.get_kore_model(MODELS["llama"](), cov, kore.KoreConfig(rank=6), progress=False)
    kore.save_adapter(model, out / "adapter-init")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=10.0 if "layers.0.self_attn.k_proj" in name else 0.1)
    kore.save_adapter(model, out / "train" / "adapter")
    return out, model, cov


def test_changes_are_those_of_the_outputs_and_stay_below_their_bounds(run):
    out, model, cov = run
    found = report_layers.measure(out / "train" / "adapter", cov, model)
    plain = report_layers.measure(out / "train" / "adapter", cov, None)
    linears, updates = named_linears(model), read_updates(out / "train" / "adapter")
    assert list(found) == list(updates) and len(found) == 14
    for name, update in updates.items():
        C, W = cov[name].double(), linears[name].weight.detach().double()
        delta = update.scaling * update.B.double() @ update.A.double()
        moved, whole = (float((M @ C @ M.mT).trace()) ** 0.5 for M in (delta, W))
        assert found[name].change == pytest.approx(moved / whole, rel=1e-3)
        assert plain[name].change == pytest.approx(moved, rel=1e-6)
        assert found[name].change <= found[name].bound * (1 + 1e-6)


def test_the_layer_that_leaked_comes_first(run, tmp_path):
    out, model, cov = run
    report = Report("a")
    report_layers.add_section(report, out, model)
    text = report.write(tmp_path / "report.html").read_text(encoding="utf-8")
    rows = re.findall(r"(model\.layers\.[\w.]+)", text.partition("its bound")[2])
    assert rows[0] == "model.layers.0.self_attn.k_proj" and len(rows) == len(set(rows)) == 10
    assert "‖ΔW x‖ / ‖W0 x‖" in text and "change, new" not in text
    cov.save(out / "covariance-new")
    report = Report("a")
    report_layers.add_section(report, out, None)
    text = report.write(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "change, new" in text and "‖W0 x‖" not in text


def test_what_takes_minutes_is_left_out(run):
    updates = read_updates(run[0] / "train" / "adapter")
    assert report_layers.is_quick(updates, torch.device("cpu"))
    wide = {
        str(i): type(u)(u.A.new_empty(1, 8192), u.B.new_empty(8192, 1), 1.0) for i, u in enumerate(updates.values())
    }
    assert not report_layers.is_quick(wide, torch.device("cpu")) and report_layers.is_quick(wide, torch.device("cuda"))


def test_a_report_is_written_where_this_cannot_be_measured(run, tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(report_layers, "add_section", broken)
    report = Report("a")
    _changes(report, run[0], None)
    text = report.write(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Could not be measured (RuntimeError: out of memory)." in text
    _changes(report, tmp_path, None)  # no adapter: nothing to say
