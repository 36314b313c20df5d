from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model

from kore.artifacts import load_tensors, save_tensors
from kore.errors import ModelError
from kore.models import (
    base_model,
    check_fingerprint,
    has_vision,
    language_model_linears,
    load_model,
    model_fingerprint,
    named_linears,
    projector_name,
    resolve_targets,
)
from tests import tiny

BUILD = {"llama": tiny.tiny_llama, "llava": tiny.tiny_llava, "qwen_vl": tiny.tiny_qwen_vl}
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("kind", BUILD)
def test_the_language_model_is_every_decoder_linear_and_nothing_else(kind):
    model = BUILD[kind]()
    names = language_model_linears(model)
    assert len(names) == 14 and {name.rpartition(".")[2] for name in names} == LINEARS
    assert not any(part in name for name in names for part in ("vision", "visual", "projector", "lm_head"))
    assert has_vision(model) == (kind != "llama")
    projector = projector_name(model)
    assert projector is None if kind == "llama" else projector.endswith(("multi_modal_projector", "visual.merger"))


@pytest.mark.parametrize("kind", BUILD)
def test_adapters_change_neither_names_nor_fingerprint(kind):
    model = BUILD[kind]()
    names, fingerprint = language_model_linears(model), model_fingerprint(model)
    modules_to_save = [projector_name(model)] if has_vision(model) else None
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], modules_to_save=modules_to_save)
    wrapped = get_peft_model(model, config)
    assert language_model_linears(wrapped) == names
    assert model_fingerprint(wrapped) == fingerprint
    assert base_model(wrapped) is model


def test_fingerprints_tell_models_apart_but_not_precisions():
    first = model_fingerprint(tiny.tiny_llama())
    assert model_fingerprint(tiny.tiny_llama().to(torch.bfloat16)) == first
    check_fingerprint(first, tiny.tiny_llama(), "covariance")
    for other, reason in (
        (tiny.tiny_llama(seed=1), "other weights"),
        (tiny.tiny_llama(num_hidden_layers=1), "other layer names or shapes"),
        (tiny.tiny_llava(), "another architecture"),
    ):
        with pytest.raises(ModelError, match=f"covariance belongs to another model: {reason}"):
            check_fingerprint(first, other, "covariance")


def test_targets_by_name_and_expression():
    model = tiny.tiny_llava()
    everything = named_linears(model)
    assert resolve_targets(model) == language_model_linears(model)
    by_name = resolve_targets(model, ["up_proj", "down_proj"])
    assert by_name == [name for name in everything if name.endswith(("up_proj", "down_proj"))]
    vision = resolve_targets(model, r".*vision_tower.*q_proj")
    assert len(vision) == 2 and all("vision_tower" in name for name in vision)
    with pytest.raises(ModelError, match=r"named 'qproj'; near: q_proj"):
        resolve_targets(model, ["qproj"])
    with pytest.raises(ModelError, match="matches no linear layer"):
        resolve_targets(model, "nothing")
    with pytest.raises(ModelError, match="not a regular expression"):
        resolve_targets(model, "(")


@pytest.mark.parametrize("kind", BUILD)
def test_models_load_as_the_right_class(kind, tmp_path):
    tiny.save_tiny(kind, tmp_path / kind)
    model = load_model(tmp_path / kind, dtype="bfloat16", device="cpu")
    assert type(model) is type(BUILD[kind]()) and model.dtype == torch.bfloat16 and not model.training


def test_what_cannot_be_loaded_is_said(tmp_path):
    with pytest.raises(ModelError, match="no such model directory"):
        load_model(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(tmp_path / "empty")
    tiny.save_tiny("llama", tmp_path / "llama")
    weights = tmp_path / "llama" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="llama: the model cannot be loaded"):
        load_model(tmp_path / "llama")
    with pytest.raises(ModelError, match="dtype: expected auto"):
        load_model(tmp_path / "llama", dtype="int8")


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    tiny.save_tiny("llava", tmp_path / "llava")
    file = tmp_path / "llava" / "model.safetensors"
    tensors = load_tensors(file)
    name = next(name for name in sorted(tensors) if "multi_modal_projector" in name)
    del tensors[name]
    save_tensors(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights of the model are not in the checkpoint.*projector"):
        load_model(tmp_path / "llava")


def test_import_is_light_and_every_public_name_exists():
    heavy = ["torch", "transformers", "peft", "triton", "scipy", "matplotlib", "datasets"]
    script = (
        "import sys, json, kore\n"
        f"loaded = [name for name in {heavy!r} if name in sys.modules]\n"
        "for name in kore.__all__: getattr(kore, name)\n"
        "print(json.dumps(loaded))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
