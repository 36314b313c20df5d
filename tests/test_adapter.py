"""The adapter: what is built, what is refused, and stock PEFT on the other side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from kore.adapter import KoreConfig, get_kore_model, load_adapter, load_kore_model, match_lora_rank, save_adapter
from kore.adapter.targets import peft_target_modules
from kore.capture import capture_covariance
from kore.covariance import CovarianceSet, merge_covariance
from kore.errors import ArtifactError, ConfigError, KoreError, ModelError
from kore.models import language_model_linears, linear_shape, named_linears
from tests.batches import KINDS, MODELS, logits, make_batch, make_batches


@pytest.fixture(scope="module")
def covariances():
    return {kind: capture_covariance(MODELS[kind](), make_batches(kind, 4)) for kind in KINDS}


def randomise(model, seed=0):
    """Values for everything trainable, as training would leave them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_built(kind, covariances):
    base = MODELS[kind]()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected = logits(base, make_batch(kind))
    model = get_kore_model(base, covariances[kind], KoreConfig(rank=7, modules_to_save="auto")).eval()
    torch.testing.assert_close(logits(model, make_batch(kind)), expected, rtol=0, atol=0)
    names = set(language_model_linears(model))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    projector = {name for name in trainable if "modules_to_save" in name}
    assert trainable - projector == {f"base_model.model.{name}.lora_B.default.weight" for name in names}
    assert bool(projector) == (kind != "llama")
    for name in names:
        layer = model.get_base_model().get_submodule(name)
        assert torch.equal(layer.weight, before[f"{name}.weight"]) and layer.scaling["default"] == 1.0
        assert not layer.lora_B["default"].weight.any()
        A = layer.lora_A["default"].weight
        assert A.shape == (7, layer.in_features) and not A.requires_grad and int(torch.linalg.matrix_rank(A)) == 7


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_adapter_gives_the_same_logits_in_stock_peft_and_merged(kind, covariances, tmp_path):
    from peft import PeftModel

    model = get_kore_model(MODELS[kind](), covariances[kind], KoreConfig(rank=7, modules_to_save="auto")).eval()
    randomise(model)
    batch = make_batch(kind)
    expected = logits(model, batch)
    assert (expected - logits(MODELS[kind](), batch)).abs().max() > 1e-2
    save_adapter(model, tmp_path / "adapter", extra={"note": 1})
    stock = PeftModel.from_pretrained(MODELS[kind](), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(stock, batch), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(stock.merge_and_unload(), batch), expected, rtol=0, atol=1e-5)
    ours = load_kore_model(MODELS[kind](), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(ours, batch), expected, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    torch.testing.assert_close(logits(model.merge_and_unload(), batch), expected, rtol=0, atol=1e-5)


def test_stock_peft_needs_no_kore(covariances, tmp_path):
    MODELS["llava"]().save_pretrained(tmp_path / "base")
    model = get_kore_model(MODELS["llava"](), covariances["llava"], KoreConfig(rank=4, modules_to_save="auto"))
    randomise(model)
    save_adapter(model, tmp_path / "adapter")
    torch.save(
        {"batch": make_batch("llava"), "logits": logits(model.eval(), make_batch("llava"))}, tmp_path / "expected.pt"
    )
    script = """
        import sys, torch
        from peft import PeftModel
        from transformers import LlavaForConditionalGeneration
        base = LlavaForConditionalGeneration.from_pretrained("base")
        model = PeftModel.from_pretrained(base, "adapter").eval()
        expected = torch.load("expected.pt")
        batch = expected["batch"]
        del batch["labels"]
        with torch.no_grad():
            found = model(**batch).logits[batch["attention_mask"].bool()]
        assert not any(name.partition(".")[0] in ("kore", "kore_kernels") for name in sys.modules)
        torch.testing.assert_close(found, expected["logits"], rtol=0, atol=1e-5)
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_saved_files(covariances, tmp_path):
    config = KoreConfig(rank=5, scale="orthonormal", modules_to_save="auto")
    model = get_kore_model(MODELS["llava"](), covariances["llava"], config)
    save_adapter(model, tmp_path / "a", extra={"stage": "init"})
    files = {file.name for file in (tmp_path / "a").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "kore.json"} <= files
    info = json.loads((tmp_path / "a" / "kore.json").read_text())
    assert info["method"] == "kore" and info["rank"] == 5 and info["extra"] == {"stage": "init"}
    assert info["config"]["scale"] == "orthonormal" and info["base_fingerprint"] == covariances["llava"].fingerprint
    assert set(info["null_spaces"]) == set(covariances["llava"].modules)
    (note,) = [note for name, note in info["null_spaces"].items() if name.endswith("layers.0.mlp.down_proj")]
    assert note["method"] == "eigh" and note["tokens"] > 0 and note["energy_ratio"] == pytest.approx(1, abs=1e-6)
    peft_config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert peft_config["peft_type"] == "LORA" and peft_config["lora_alpha"] == peft_config["r"] == 5
    assert peft_config["lora_dropout"] == 0 and peft_config["modules_to_save"] == ["multi_modal_projector"]
    again = get_kore_model(MODELS["llava"](), covariances["llava"], config)
    save_adapter(again, tmp_path / "b", extra={"stage": "init"})
    for name in ("adapter_config.json", "adapter_model.safetensors", "kore.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    resaved = load_kore_model(MODELS["llava"](), tmp_path / "a")
    save_adapter(resaved, tmp_path / "a", extra={"stage": "init"})
    assert (tmp_path / "a" / "kore.json").read_bytes() == (tmp_path / "b" / "kore.json").read_bytes()


def test_killed_while_building_the_same_command_gives_the_same_files(covariances, tmp_path):
    covariances["llama"].save(tmp_path / "covariance")
    script = """
        import os, signal, sys, torch
        import kore, kore.adapter.files, kore.artifacts
        from tests.batches import MODELS
        torch.set_num_threads(int(sys.argv[2]))
        model = kore.get_kore_model(MODELS["llama"](), kore.load_covariance("covariance"), kore.KoreConfig(rank=4))
        if sys.argv[1] == "kill":  # after the weights are written, before the adapter is complete
            kore.adapter.files.file_sha256 = lambda path: os.kill(os.getpid(), signal.SIGKILL)
        kore.save_adapter(model, "adapter")
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", textwrap.dedent(script), "kill", str(torch.get_num_threads())]
    killed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "adapter").exists()
    model = get_kore_model(MODELS["llama"](), covariances["llama"], KoreConfig(rank=4))
    save_adapter(model, tmp_path / "adapter")
    assert [file for file in tmp_path.iterdir() if file.name.startswith(".")] == []
    save_adapter(get_kore_model(MODELS["llama"](), covariances["llama"], KoreConfig(rank=4)), tmp_path / "other")
    for name in ("adapter_model.safetensors", "kore.json"):
        assert (tmp_path / "adapter" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "targets",
    [
        None,
        ["q_proj"],
        ["down_proj", "layers.1.mlp.up_proj"],
        ["layers.0.mlp.up_proj", "layers.1.mlp.down_proj"],
        r".*layers\.1\.self_attn\.[qk]_proj",
    ],
)
def test_target_modules_select_exactly_the_resolved_layers(kind, targets):
    from peft.tuners.lora import LoraLayer

    from kore.models import resolve_targets

    base = MODELS[kind]()
    cov = capture_covariance(base, make_batches(kind, 4), targets=targets)
    names = resolve_targets(base, targets)
    base = get_kore_model(base, cov, KoreConfig(rank=3, targets=targets)).get_base_model()
    assert {name for name, module in base.named_modules() if isinstance(module, LoraLayer)} == set(names)


def test_target_modules_prefer_plain_names():
    assert peft_target_modules(MODELS["llama"](), language_model_linears(MODELS["llama"]())) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    odd = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    assert (
        peft_target_modules(MODELS["llama"](), odd)
        == r"model\.layers\.0\.self_attn\.q_proj|model\.layers\.1\.mlp\.up_proj"
    )
    assert isinstance(peft_target_modules(MODELS["llava"](), language_model_linears(MODELS["llava"]())), str)


def test_conv1d_layers():
    from transformers import GPT2Config, GPT2LMHeadModel

    def make():
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=320, n_positions=64, n_embd=16, n_layer=1, n_head=2)
        return GPT2LMHeadModel(config).eval()

    batches = make_batches("llama", 3)
    model = get_kore_model(make(), capture_covariance(make(), batches), KoreConfig(rank=3)).eval()
    torch.testing.assert_close(logits(model, batches[0]), logits(make(), batches[0]), rtol=0, atol=0)
    layer = model.get_base_model().transformer.h[0].attn.c_attn
    assert layer.lora_A["default"].weight.shape == (3, 16) and layer.lora_B["default"].weight.shape == (48, 3)


def test_bfloat16_base_keeps_its_weights_and_gets_a_float32_adapter(covariances):
    base = MODELS["llama"]().to(torch.bfloat16)
    model = get_kore_model(base, covariances["llama"], KoreConfig(rank=3))
    reference = get_kore_model(MODELS["llama"](), covariances["llama"], KoreConfig(rank=3))
    layer, other = (m.get_base_model().model.layers[0].mlp.up_proj for m in (model, reference))
    assert layer.weight.dtype == torch.bfloat16 and layer.lora_A["default"].weight.dtype == torch.float32
    spans = [torch.linalg.qr(a.lora_A["default"].weight.T.double()).Q for a in (layer, other)]
    torch.testing.assert_close(spans[0] @ spans[0].T, spans[1] @ spans[1].T, rtol=0, atol=1e-5)
    assert torch.isfinite(logits(model.eval(), make_batch("llama"))).all()


def test_without_constraint_a_is_a_random_subspace_that_depends_on_seed_and_layer(covariances):
    def factor(layer=0, **changes):
        config = KoreConfig(rank=3, constraint="none", **changes)
        model = get_kore_model(MODELS["llama"](), None, config)
        return model.get_base_model().model.layers[layer].self_attn.q_proj.lora_A["default"].weight

    assert torch.equal(factor(), factor()) and not torch.equal(factor(), factor(seed=1))
    rows = [torch.nn.functional.normalize(factor(layer, scale="orthonormal"), dim=1) for layer in (0, 1)]
    assert not torch.allclose(rows[0], rows[1])


@pytest.mark.parametrize(
    ("kind", "layers", "expected"),
    [("llava_7b", 32, 235), ("llava_13b", 40, 235), ("qwen_vl_7b", 28, 232)],
)
def test_match_lora_rank_on_the_real_shapes(kind, layers, expected):
    from accelerate import init_empty_weights
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    with init_empty_weights():
        if kind == "qwen_vl_7b":  # its language model
            sizes = dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4)
            model = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=layers, **sizes))
        else:
            d, f, heads = (4096, 11008, 32) if kind == "llava_7b" else (5120, 13824, 40)
            text = LlamaConfig(hidden_size=d, intermediate_size=f, num_hidden_layers=layers, num_attention_heads=heads)
            model = LlavaForConditionalGeneration(
                LlavaConfig(vision_config=CLIPVisionConfig(num_hidden_layers=1), text_config=text)
            )
    linears = named_linears(model)
    shapes = [linear_shape(linears[name]) for name in language_model_linears(model)]
    assert len(shapes) == 7 * layers
    assert match_lora_rank(shapes, 128) == expected
    budget = 128 * sum(d_out + d_in for d_out, d_in in shapes)
    outputs = sum(d_out for d_out, _ in shapes)
    assert expected * outputs <= budget < (expected + 1) * outputs
    if kind == "llava_7b":
        assert round((budget + 1024 * 4096 + 4096 + 4096 * 4096 + 4096) / 1e6) == 341


def test_match_lora_as_a_rank(covariances):
    model = get_kore_model(MODELS["llama"](), covariances["llama"], KoreConfig(rank="match-lora-8"))
    shapes = [linear_shape(linear) for name, linear in named_linears(MODELS["llama"]()).items() if name != "lm_head"]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    budget = 8 * sum(d_out + d_in for d_out, d_in in shapes)
    assert trained <= budget < trained + sum(d_out for d_out, _ in shapes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank: expected a positive integer"),
        ({"rank": 2.0}, "rank: expected a positive integer"),
        ({"rank": "match-lora-x"}, "match-lora-R"),
        ({"scale": "big"}, "scale: expected one of sqrt, orthonormal"),
        ({"constraint": "some"}, "constraint"),
        ({"solver": "lu"}, "solver"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_configurations(changes, message):
    with pytest.raises(ConfigError, match=message):
        KoreConfig(**{"rank": 4, **changes})


def test_refusals_leave_the_model_as_it_was(covariances):
    model = MODELS["llama"]()
    cov = covariances["llama"]
    modules = [name for name, _ in model.named_modules()]
    for config, message in (
        (KoreConfig(rank=49), r"rank: 49 is larger than d_in = 48 of model\.layers\.0\.self_attn\.q_proj"),
        (KoreConfig(rank="match-lora-40"), "from 'match-lora-40'"),
        (KoreConfig(rank=4, modules_to_save=["lm_haed"]), "modules_to_save: 'lm_haed' names no module"),
        (KoreConfig(rank=4, modules_to_save=["norm"]), "names .* modules"),
        (KoreConfig(rank=4, modules_to_save=["layers.0.mlp"]), "not both"),
        (KoreConfig(rank=4, targets=["lm_head"]), "no covariance for module 'lm_head'"),
        (KoreConfig(rank=4, targets=["q_prj"]), "q_proj"),
    ):
        with pytest.raises(KoreError, match=message):
            get_kore_model(model, cov, config)
    with pytest.raises(ModelError, match="belongs to another model: other weights"):
        get_kore_model(MODELS["llama"](1), cov, KoreConfig(rank=4))
    with pytest.raises(ModelError, match="belongs to another model"):
        get_kore_model(MODELS["llava"](), cov, KoreConfig(rank=4))
    with pytest.raises(ConfigError, match="needs a covariance"):
        get_kore_model(model, None, KoreConfig(rank=4))
    broken = CovarianceSet(
        {group.name: torch.full((group.dim, group.dim), float("nan")) for group in cov.groups},
        cov.groups,
        cov.fingerprint,
    )
    with pytest.raises(KoreError, match=r"model\.layers\.0\.self_attn\.q_proj: C: holds NaN"):
        get_kore_model(model, broken, KoreConfig(rank=4))
    assert modules == [name for name, _ in model.named_modules()]
    adapted = get_kore_model(model, cov, KoreConfig(rank=4))
    with pytest.raises(ModelError, match="merge or unload"):
        get_kore_model(adapted, cov, KoreConfig(rank=4))
    with pytest.raises(KoreError, match="expected a model with an adapter"):
        save_adapter(MODELS["llama"](), "nowhere")


def test_few_tokens_are_said(covariances, recwarn):
    few = capture_covariance(MODELS["llama"](), [make_batch("llama")])
    with pytest.warns(UserWarning, match=r"down_proj.*on 56 tokens, fewer than d_in = 80 \(2 such inputs\)"):
        get_kore_model(MODELS["llama"](), few, KoreConfig(rank=4))
    recwarn.clear()
    get_kore_model(MODELS["llama"](), merge_covariance([covariances["llama"]]), KoreConfig(rank=4))
    assert not [warning for warning in recwarn if "fewer than d_in" in str(warning.message)]


def test_loading_refuses_other_models_and_broken_files(covariances, tmp_path):
    save_adapter(get_kore_model(MODELS["llama"](), covariances["llama"], KoreConfig(rank=4)), tmp_path / "a")
    with pytest.raises(ModelError, match="belongs to another model"):
        load_kore_model(MODELS["llama"](1), tmp_path / "a")
    with pytest.raises(ArtifactError, match="no such adapter"):
        load_kore_model(MODELS["llama"](), tmp_path / "b")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-20])
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors: corrupt"):
        load_kore_model(MODELS["llama"](), tmp_path / "a")
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors: no such file"):
        load_kore_model(MODELS["llama"](), tmp_path / "a")
    (tmp_path / "a" / "kore.json").unlink()
    with pytest.raises(ArtifactError, match=r"no kore\.json"):
        load_kore_model(MODELS["llama"](), tmp_path / "a")


@pytest.mark.parametrize("trainable", [False, True])
def test_load_adapter_takes_kore_and_plain_peft_adapters(covariances, tmp_path, trainable):
    from peft import LoraConfig, get_peft_model

    plain = get_peft_model(MODELS["llama"](), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    ours = get_kore_model(MODELS["llama"](), covariances["llama"], KoreConfig(rank=3))
    randomise(ours)
    plain.save_pretrained(tmp_path / "plain")
    save_adapter(ours, tmp_path / "ours")
    for name, model in (("plain", plain), ("ours", ours)):
        loaded = load_adapter(MODELS["llama"](), tmp_path / name, trainable).eval()
        torch.testing.assert_close(
            logits(loaded, make_batch("llama")), logits(model.eval(), make_batch("llama")), rtol=0, atol=1e-6
        )
        frozen = {n.split(".lora_")[1][0] for n, p in loaded.named_parameters() if "lora_" in n and not p.requires_grad}
        assert frozen == ({"A", "B"} if not trainable else {"A"} if name == "ours" else set())
    (tmp_path / "plain" / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(ArtifactError, match="plain: not a PEFT adapter of this model"):
        load_adapter(MODELS["llama"](), tmp_path / "plain")
    with pytest.raises(ArtifactError, match="no such adapter directory"):
        load_adapter(MODELS["llama"](), tmp_path / "gone")
