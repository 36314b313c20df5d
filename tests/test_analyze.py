"""``kore analyze`` as a user runs it: covariances, an adapter and a model in, one directory out."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch

from kore import analysis
from kore.adapter import KoreConfig, get_kore_model, save_adapter
from kore.artifacts import load_tensors, read_manifest
from kore.capture import capture_covariance
from kore.cli import main
from kore.covariance import load_covariance
from kore.models import load_model
from tests.batches import make_batches
from tests.test_report import Page
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model, three covariances of which two are of the same kind of data, and a trained adapter."""
    folder = tmp_path_factory.mktemp("analyze")
    save_tiny("llama", folder / "model")
    save_tiny("llama", folder / "other", seed=1)
    model = load_model(folder / "model", device="cpu")
    batches = make_batches("llama", 12)
    few = [{**batch, "input_ids": batch["input_ids"] % 7 + 20} for batch in make_batches("llama", 6)]
    covs = {"a": batches[:6], "b": batches[6:], "few": few}
    for name, data in covs.items():
        capture_covariance(model, data, dtype=torch.float64, progress=False).save(folder / name)
    peft = get_kore_model(model, load_covariance(folder / "a"), KoreConfig(rank=4), progress=False)
    save_adapter(peft, folder / "init")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    save_adapter(peft, folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def result(work):
    words = ["analyze", f"a={work}/a", f"other half={work}/b", "--new", f"{work}/few", "-a", work / "adapter"]
    words += ["-m", work / "model", "-o", work / "out", "--device", "cpu"]
    words += ["--modules", r".*\.(q|up|down)_proj"]
    assert main([str(word) for word in words]) == 0
    return work / "out"


def read(result):
    return json.loads((result / "analysis.json").read_text())


def table(result, name):
    with open(result / "tables" / f"{name}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_numbers_are_those_of_the_library(work, result):
    found, covs = read(result), {"a": load_covariance(work / "a"), "few": load_covariance(work / "few")}
    assert list(found["data"]) == ["a", "other half", "few"]
    assert [entry["role"] for entry in found["data"].values()] == ["old", "old", "new"]
    tensors = load_tensors(result / "analysis.safetensors")
    for name, cov in covs.items():
        leaks = analysis.leak(work / "adapter", cov)
        assert len(found["layers"]) == 6
        for module, sets in found["layers"].items():
            assert sets[name]["leak"] == pytest.approx(leaks[module])
        group = cov.groups[0].name
        assert torch.equal(tensors[f"spectrum/{name}/{group}"], analysis.spectrum(cov[group]))
        assert tensors[f"map/{name}/{group}"].shape == (32, 32)
    module = "model.layers.1.mlp.down_proj"
    entry = found["layers"][module]
    assert entry["a"]["energy_ratio"] == pytest.approx(1, abs=1e-4) and entry["few"]["energy_ratio"] > 1.5
    assert entry["a"]["leak"] < 0.5 * entry["few"]["leak"]
    rows = {(row["module"], row["data"]): row for row in table(result, "layers")}
    assert float(rows[module, "a"]["leak"]) == entry["a"]["leak"] and len(rows) == 3 * len(found["layers"])
    read_manifest(result, "analysis")


def test_the_learning_rate_is_that_of_new_data_and_the_layers_asked_for(work, result):
    rates = analysis.step_matched_rate(work / "adapter", load_covariance(work / "few")).by_module
    (found,) = read(result)["rates"].values()
    assert found["by_module"] == pytest.approx({module: rates[module] for module in read(result)["layers"]})
    assert found["learning_rate"] == pytest.approx(float(np.median(list(found["by_module"].values()))))
    assert "A learning rate to begin with" in (result / "report.html").read_text(encoding="utf-8")


def test_related_data_are_more_alike(result):
    for measure in ("maps", "frobenius"):
        mean = np.array(read(result)["similarity"][measure]["mean"])
        assert np.allclose(mean, mean.T) and np.allclose(np.diag(mean), 1)
        assert mean[0, 1] > max(mean[0, 2], mean[1, 2]) + 0.05


def test_retention_is_relative_to_the_outputs_and_below_its_bound(work, result):
    model, cov = load_model(work / "model", device="cpu"), load_covariance(work / "a")
    for module, sets in read(result)["layers"].items():
        W = model.get_submodule(module).weight.detach().double()
        output = float(((W @ cov[module]) * W).sum()) ** 0.5
        assert sets["a"]["change_ratio"] == pytest.approx(sets["a"]["change"] / output)
        assert all(0 < entry["change_ratio"] <= entry["bound_ratio"] for entry in sets.values())


def test_reconstruction_that_sees_the_data_loses_less(result):
    for entry in read(result)["reconstruction"].values():
        errors, half = entry["errors"], len(entry["discarded"]) // 2
        assert entry["discarded"][0] == 0 and errors["svd"]["a"][0] == 0
        for name in ("a", "other half"):
            assert errors["co-svd-root"][name][half] < errors["svd"][name][half]
    assert {row["method"] for row in table(result, "reconstruction")} == {"svd", "asvd", "co-svd", "co-svd-root"}


def test_the_page_stands_alone_and_every_figure_is_a_picture_too(result):
    text = (result / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    pictures = sorted((result / "figures").glob("*.png"))
    assert "script" not in page.tags and page.tags.count("svg") == len(pictures) == 8
    assert all(reference.startswith(("#", "data:image/")) for reference in page.references)
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert "reconstruction-other-half.png" in {picture.name for picture in pictures}


def test_one_covariance_alone_and_an_untrained_adapter(work, tmp_path, capsys):
    words = ["analyze", str(work / "a"), "-o", str(tmp_path / "out"), "--modules", r".*\.0\..*q_proj"]
    assert main([*words, "--device", "cpu"]) == 0
    found = read(tmp_path / "out")
    assert list(found["inputs"]) == ["model.layers.0.self_attn.q_proj"] and not found["layers"]
    assert main([*words, "--device", "cpu", "-a", str(work / "init")]) == 0
    assert "mean leak" in capsys.readouterr().out
    assert "the adapter is not trained" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{w}/none"], "no such covariance directory"),
        (["{w}/a", "{w}/a"], "two covariances are called 'a'"),
        (["{w}/a", "--new", "a={w}/b"], "two data sets are called 'a'"),
        (["=x"], "expected NAME=DIRECTORY"),
        (["{w}/a", "--modules", "nothing"], "matches none of the 14 layers"),
        (["{w}/a", "--modules", "("], "not a regular expression"),
        (["{w}/a", "-a", "{w}/model"], "adapter_config.json: no such file"),
        (["{w}/a", "-m", "{w}/other"], "belongs to another model"),
        (["{w}/a", "-m", "{w}/none"], "no such model directory"),
    ],
)
def test_mistakes_are_one_line(work, tmp_path, capsys, words, message):
    words = [word.format(w=work) for word in words]
    assert main(["analyze", *words, "-o", str(tmp_path / "out"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
