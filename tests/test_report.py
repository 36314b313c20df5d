"""Reports are one safe, self-contained file, and their figures carry what they are given."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from kore.report import Report, figures


class Page(HTMLParser):
    """Collects tags, what they refer to, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.bold: list[str] = []
        self._in_bold = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]
        self._in_bold = tag == "strong"

    def handle_data(self, data):
        if self._in_bold:
            self.bold.append(data)
            self._in_bold = False


def full_report(tmp_path):
    from PIL import Image

    Image.new("RGB", (12, 8), "red").save(tmp_path / "red.png")
    covariance = torch.diag(torch.logspace(0, -4, 40, dtype=torch.float64))
    leaks = {"old inputs": {f"model.layers.{i}.mlp.up_proj": 10.0 ** -(i + 3) for i in range(3)}}
    report = Report("A <b>title", "and a subtitle").tiles([("HARS", "82.81"), ("K.A", "1.0", "0.5 before")])
    report.section("Scores", "First paragraph.\n\nSecond & last.").facts({"python": "3", "commit": None})
    report.figure(figures.loss_curves({"a": [{"step": i, "loss": 1.0 / (i + 1)} for i in range(60)]}), "Loss")
    report.figure(figures.adaptation_retention_plane({"KORE": [(30.0, 40.0), (32.0, 41.0)]}, (7.0, 46.0)))
    report.figure(figures.covariance_heat_maps({"model.layers.0.mlp.up_proj": covariance}))
    report.figure(figures.spectra({"model.layers.0.mlp.up_proj": covariance.diagonal()}, rank=4))
    report.figure(figures.leak_per_layer(leaks)).code("a: <1>", "Configuration")
    sample = {"image": tmp_path / "red.png", "question": "<image>\nWho?", "expected": ["x", "y"]}
    report.samples([{**sample, "answers": {"before": "<script>", "after": ""}, "correct": {"before": False}}])
    return report.section("Scores").text("Again.")


def test_a_page_refers_to_nothing_outside_itself_and_escapes_text(tmp_path):
    path = full_report(tmp_path).write(tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and page.tags.count("svg") == 5 and page.tags.count("img") == 1
    assert all(reference.startswith(("#", "data:image/")) for reference in page.references)
    assert not re.search(r"url\((?!#|&quot;#)|@import", text)
    assert "A &lt;b&gt;title" in text and "&lt;script&gt;" in text and "Second &amp; last." in text
    assert 'id="scores"' in text and 'id="scores-2"' in text
    assert "Who?" in text and "&lt;image&gt;" not in text
    assert "x / y" in text and "(nothing)" in text


def test_figures_take_the_colours_of_the_page():
    svg = figures.to_svg(figures.loss_curves({"a": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]}))
    assert "currentColor" in svg and "var(--grid)" in svg
    assert figures._INK not in svg and figures._GRID not in svg
    assert svg == figures.to_svg(figures.loss_curves({"a": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]}))


def test_the_best_of_a_column_is_bold_and_ties_after_rounding_all_are():
    rows = [["a", 1.001, 5, None], ["b", 0.999, 7, 2.0], ["c", 0.5, 6, 3.0]]
    report = Report("t").table(["name", "up", "down", "gap"], rows, best={"up": "max", "down": "min", "gap": "max"})
    assert Page(report.html()).bold == ["1.00", "5", "1.00", "3.00"]


def test_tables_are_checked():
    with pytest.raises(ValueError, match="expected 2 cells a row, got 1"):
        Report("t").table(["a", "b"], [["x"]])
    with pytest.raises(ValueError, match="best: expected a column"):
        Report("t").table(["a"], [[1]], best={"z": "max"})


def test_heat_map_cells_are_means_of_absolute_values():
    matrix = np.random.default_rng(0).normal(size=(70, 70))
    cells = figures.pooled(matrix)
    assert cells.shape == (32, 32)
    edges = np.linspace(0, 70, 33).astype(int)
    block = np.abs(matrix[edges[3] : edges[4], edges[7] : edges[8]])
    assert cells[3, 7] == pytest.approx(block.mean(), rel=1e-12)
    small = np.arange(9.0).reshape(3, 3) - 4
    assert np.array_equal(figures.pooled(small), np.abs(small))


def test_empty_figures_are_drawn():
    for draw in (figures.loss_curves, figures.spectra, figures.covariance_heat_maps, figures.leak_per_layer):
        assert "<svg" in figures.to_svg(draw({}))
    for draw in (figures.heat_map_table, figures.spectra_by_kind, figures.discard_curves):
        assert "<svg" in figures.to_svg(draw({}))
    assert "<svg" in figures.to_svg(figures.similarity_matrices([], {}))


def test_the_kind_of_a_module_is_its_name_in_a_layer():
    assert figures.module_kind("model.layers.11.self_attn.q_proj") == "self_attn.q_proj"
    assert figures.module_kind("h.3.experts.2.up") == "up" and figures.module_kind("head") == "head"
