"""Covariance sets: files, laziness, corruption, merging."""

from __future__ import annotations

import functools
import json

import pytest
import torch

from kore.artifacts import file_sha256, save_tensors, write_manifest
from kore.capture import capture_covariance
from kore.covariance import CovarianceSet, Group, load_covariance, merge_covariance
from kore.errors import ArtifactError, KoreError
from tests.batches import MODELS, make_batches


@pytest.fixture(scope="module")
def halves():
    model, batches = MODELS["llava"](), make_batches("llava", 4)
    runs = [capture_covariance(model, part, dtype=torch.float64) for part in (batches, batches[:2], batches[2:])]
    return tuple(runs)


def test_saved_and_loaded_is_the_same(halves, tmp_path):
    whole = halves[0]
    whole.save(tmp_path / "c")
    loaded = load_covariance(tmp_path / "c")
    assert loaded.groups == whole.groups and loaded.fingerprint == whole.fingerprint
    assert (loaded.normalize, loaded.selection, loaded.dtype) == ("none", "all", "float64")
    assert loaded.modules == whole.modules
    assert all(torch.equal(loaded[name], whole[name]) for name in whole.modules)
    assert len(list((tmp_path / "c").glob("*.safetensors"))) == len(whole.groups) == 8
    loaded.save(tmp_path / "c")  # over the files it reads from
    again = load_covariance(tmp_path / "c")
    assert all(torch.equal(again[name], whole[name]) for name in whole.modules)


def test_a_file_holds_half_of_the_matrix(tmp_path):
    halves = CovarianceSet({"a": torch.eye(300)}, [Group("a", ("a",), 300, 5)], {})
    halves.save(tmp_path / "c")
    size = (tmp_path / "c" / "group-00000.safetensors").stat().st_size
    assert 300 * 301 / 2 * 4 <= size < 300 * 301 / 2 * 4 + 200


def test_files_of_schema_version_1_still_load(tmp_path):
    small_set().save(tmp_path / "c")
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert manifest.pop("schema_version") == 2
    for option in ("selection", "dtype"):
        del manifest[option]
    for index, matrix in enumerate([torch.full((3, 3), 7.0), torch.full((2, 2), 8.0)]):
        save_tensors({"covariance": matrix}, tmp_path / "c" / f"group-{index:05d}.safetensors")
    fields = {name: manifest[name] for name in ("groups", "normalize", "fingerprint")}
    write_manifest(tmp_path / "c", "covariance", {**fields, "schema_version": 1})
    loaded = load_covariance(tmp_path / "c")
    assert torch.equal(loaded["b"], torch.full((3, 3), 7.0)) and torch.equal(loaded["c"], torch.full((2, 2), 8.0))
    assert (loaded.selection, loaded.dtype) == ("all", None)


def test_a_file_of_another_size_is_named(tmp_path):
    small_set().save(tmp_path / "c")
    file = tmp_path / "c" / "group-00000.safetensors"
    save_tensors({"lower": torch.zeros(10)}, file)
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    manifest["files"][file.name] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
    (tmp_path / "c" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"group-00000\.safetensors: expected .* 6 entries .* lower \(10,\)"):
        load_covariance(tmp_path / "c")["a"]


def test_merging_two_halves_equals_one_run(halves, tmp_path):
    whole, first, second = halves
    merged = merge_covariance([first, second])
    assert merged.groups == whole.groups
    for name in whole.modules:
        torch.testing.assert_close(merged[name], whole[name], rtol=1e-12, atol=1e-12)
    second.save(tmp_path / "half")
    merged.save(tmp_path / "merged")
    loaded = merge_covariance([first, load_covariance(tmp_path / "half")])
    stored = load_covariance(tmp_path / "merged")
    assert all(torch.equal(loaded[name], stored[name]) for name in whole.modules)
    assert stored.groups == whole.groups


def test_weights(halves):
    _, first, second = halves
    name = first.modules[0]
    before = first[name].clone()
    merged = merge_covariance([first, second], weights=[0.25, 2])
    torch.testing.assert_close(merged[name], 0.25 * first[name] + 2 * second[name])
    alone = merge_covariance([first, second], weights=[1, 0])
    assert torch.equal(alone[name], before) and alone.tokens(name) == first.tokens(name)
    assert torch.equal(first[name], before)


@pytest.mark.parametrize("weights", [[1.0], [1, -1], [0, 0], [1, float("nan")]])
def test_wrong_weights(halves, weights):
    with pytest.raises(KoreError, match="weights"):
        merge_covariance(halves[1:], weights=weights)


def test_merge_refuses_other_models_modules_scalings_and_groupings(halves):
    model, batches = MODELS["llava"](), make_batches("llava", 1)
    capture = functools.partial(capture_covariance, progress=False, dtype=torch.float64)
    first = halves[1]
    with pytest.raises(KoreError, match=r"another model than set 0 \(weights differs\)"):
        merge_covariance([first, capture(MODELS["llava"](1), batches)])
    with pytest.raises(KoreError, match="another model"):
        merge_covariance([first, capture(MODELS["llama"](), make_batches("llama", 1))])
    with pytest.raises(KoreError, match="other modules"):
        merge_covariance([first, capture(model, batches, targets=r".*language_model.*q_proj")])
    with pytest.raises(KoreError, match="normalize='none', set 1 with 'official'"):
        merge_covariance([first, capture(model, batches, normalize="official")])
    with pytest.raises(KoreError, match="tokens='all', set 1 with 'image'"):
        merge_covariance([first, capture(model, batches, tokens="image")])
    with pytest.raises(KoreError, match="dtype='float64', set 1 with 'float32'"):
        merge_covariance([first, capture(model, batches, dtype=torch.float32)])
    with pytest.raises(KoreError, match="share_inputs"):
        merge_covariance([first, capture(model, batches, share_inputs=False)])
    with pytest.raises(KoreError, match="at least one"):
        merge_covariance([])


def test_an_unknown_module_is_named_with_near_ones(halves):
    with pytest.raises(KoreError, match=r"layers\.0\.mlp\.gate_prj.*near: .*gate_proj"):
        halves[0]["model.language_model.layers.0.mlp.gate_prj"]
    assert "nothing" not in halves[0]


def small_set() -> CovarianceSet:
    groups = [Group("a", ("a", "b"), 3, 5), Group("c", ("c",), 2, 5)]
    matrices = {"a": torch.eye(3), "c": 2 * torch.eye(2)}
    return CovarianceSet(matrices, groups, {"architecture": "X", "structure": "y", "weights": None})


def test_only_the_group_that_is_read_is_loaded(tmp_path):
    small_set().save(tmp_path / "c")
    loaded = load_covariance(tmp_path / "c")
    (tmp_path / "c" / "group-00001.safetensors").unlink()
    assert torch.equal(loaded["b"], torch.eye(3))
    with pytest.raises(ArtifactError, match=r"group-00001\.safetensors: no such file"):
        loaded["c"]
    with pytest.raises(ArtifactError, match="missing"):
        load_covariance(tmp_path / "c")


def test_corrupt_and_truncated_files_are_named(tmp_path):
    small_set().save(tmp_path / "c")
    file = tmp_path / "c" / "group-00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    loaded = load_covariance(tmp_path / "c")
    with pytest.raises(ArtifactError, match=r"group-00000\.safetensors: corrupt"):
        loaded["a"]
    file.write_bytes(content[:-8])
    with pytest.raises(ArtifactError, match=r"group-00000\.safetensors: truncated"):
        load_covariance(tmp_path / "c")


def test_a_manifest_without_groups_and_a_directory_of_another_kind(tmp_path):
    small_set().save(tmp_path / "c")
    manifest = tmp_path / "c" / "manifest.json"
    fields = json.loads(manifest.read_text())
    del fields["groups"]
    manifest.write_text(json.dumps(fields))
    with pytest.raises(ArtifactError, match="does not describe its groups"):
        load_covariance(tmp_path / "c")
    with pytest.raises(ArtifactError, match="no such covariance"):
        load_covariance(tmp_path / "nothing")


def spread_set(scale: float, seed: int, dtype: torch.dtype = torch.float64) -> CovarianceSet:
    """Group a of trace ~ scale, group c 0."""
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale**0.5
    groups = [Group("a", ("a", "b"), 3, 7), Group("c", ("c",), 2, 7)]
    return CovarianceSet({"a": x.T @ x, "c": torch.zeros(2, 2, dtype=dtype)}, groups, {}, dtype="float64")


def test_balanced_gives_every_set_the_same_trace():
    sets = [spread_set(1.0, 0), spread_set(1e6, 1), spread_set(1e-4, 2)]
    C = [one["a"] for one in sets]
    total = sum(matrix.trace() for matrix in C)
    expected = sum(matrix / matrix.trace() for matrix in C) * total / 3
    merged = merge_covariance(sets, weights="balanced")
    torch.testing.assert_close(merged["b"], expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(merged["a"].trace(), total, rtol=1e-13, atol=0)
    assert merged.tokens("a") == 21 and torch.equal(merged["c"], torch.zeros(2, 2, dtype=torch.float64))
    assert all(torch.equal(one["a"], before) for one, before in zip(sets, C))
    alone = merge_covariance(sets[:1], weights="balanced")
    torch.testing.assert_close(alone["a"], C[0], rtol=1e-13, atol=0)


def test_a_set_that_is_zero_does_not_count_in_the_balance():
    zero = spread_set(0.0, 3)
    for order in ([zero, spread_set(1.0, 0)], [spread_set(1.0, 0), zero]):
        torch.testing.assert_close(merge_covariance(order, "balanced")["a"], spread_set(1.0, 0)["a"])


def test_balancing_is_lazy_and_says_how_it_was_made(tmp_path):
    parts = {"general": spread_set(1.0, 0), "maths": spread_set(9.0, 1)}
    for name, part in parts.items():
        part.save(tmp_path / name)
    merged = merge_covariance({name: load_covariance(tmp_path / name) for name in parts}, weights="balanced")
    merged.save(tmp_path / "merged")
    stored = load_covariance(tmp_path / "merged")
    assert torch.equal(stored["a"], merged["a"])
    sets = [{"name": "general", "tokens": 7}, {"name": "maths", "tokens": 7}]
    assert stored.merged_from == merged.merged_from == {"weights": "balanced", "sets": sets}
    assert merge_covariance(list(parts.values()), [1, 3]).merged_from["weights"] == [1.0, 3.0]
    assert load_covariance(tmp_path / "maths").merged_from is None
    (tmp_path / "maths" / "group-00000.safetensors").unlink()
    with pytest.raises(ArtifactError, match="no such file"):
        merged["a"]


def test_an_unknown_kind_of_weights_is_named(halves):
    with pytest.raises(KoreError, match="None or 'balanced' as weights, got 'equal'"):
        merge_covariance(halves[1:], weights="equal")
