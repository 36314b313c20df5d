"""Official checkpoints to adapters and back, on models built, trained and saved as the official code does."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import kore
from kore.adapter import load_adapter, save_adapter
from kore.cli.main import main
from kore.errors import ArtifactError, ConfigError, ModelError
from kore.official.checkpoint import Checkpoint
from kore.official.factors import initial_factor, split
from kore.official.names import role_of
from kore.official.to_adapter import to_adapter
from kore.official.to_official import to_official
from tests.batches import KINDS, MODELS, logits, make_batch
from tests.official_models import RANK, RemoteLinear, officialise, train

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}  # W_res is rounded to the dtype of the checkpoint
SHORT = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def biased(kind):
    """A base model; where its layers have biases, they are not zero."""
    model = MODELS[kind]()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and "vis" not in name:
            parameter.data.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Base model and trained official checkpoint, by kind and dtype; read only."""
    made = {}

    def world(kind="llama", dtype=torch.float32, factor="ALinear"):
        key = kind, dtype, factor
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{kind}-{SHORT[dtype]}-{factor}")
            biased(kind).to(dtype).save_pretrained(made[key] / "base")
            model = officialise(kore.load_model(made[key] / "base", device="cpu")).float()
            model.config.lora_r = RANK
            train(model, kind, factor=factor).to(dtype).save_pretrained(made[key] / "official", max_shard_size="100KB")
        return made[key]

    return world


def official_logits(world, kind):
    """Of the checkpoint's own weights, computed in float32."""
    model = officialise(kore.load_model(world / "base", device="cpu", dtype="float32"))
    stored = Checkpoint(world / "official")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(stored[stored.roles[role_of(name)]])
    return logits(model, make_batch(kind))


def adapted_logits(world, adapter, kind):
    """By plain PEFT on the untouched base, computed in float32."""
    base = kore.load_model(world / "base", device="cpu", dtype="float32")
    return logits(PeftModel.from_pretrained(base, str(adapter)).float().eval(), make_batch(kind))


def assert_near(ours, theirs, tolerance):
    assert (ours.double() - theirs.double()).norm() <= tolerance * theirs.double().norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(worlds, tmp_path, kind, dtype):
    world = worlds(kind, dtype)
    done = to_adapter(world / "official", world / "base", tmp_path / "adapter", progress=False)
    assert done.rank == RANK and done.projector == (kind != "llama") and max(done.remainders.values()) < 0.6
    theirs = official_logits(world, kind)
    assert_near(adapted_logits(world, tmp_path / "adapter", kind), theirs, TOLERANCE[dtype])
    untouched = logits(kore.load_model(world / "base", device="cpu", dtype="float32"), make_batch(kind))
    assert (untouched - theirs).norm() > 0.1 * theirs.norm()

    model = load_adapter(kore.load_model(world / "base", device="cpu"), tmp_path / "adapter")
    assert model.kore_info["a_frozen"] and model.peft_config["default"].lora_alpha == RANK
    assert not kore.accelerate(model).left

    to_official(
        tmp_path / "adapter", world / "base", tmp_path / "back", form="paper", shard_bytes=100_000, progress=False
    )
    first, second = Checkpoint(world / "official"), Checkpoint(tmp_path / "back")
    assert first.roles.keys() == second.roles.keys()
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    for role, name in first.roles.items():
        ours, theirs = second[second.roles[role]], first[name]
        assert ours.dtype == theirs.dtype == dtype, role
        if "ALinear.weight" in role or "weight_residual" in role:
            assert_near(ours, theirs, TOLERANCE[dtype])
        else:
            assert torch.equal(ours, theirs), role


def test_lossless_form_is_read_by_official_code(worlds, tmp_path):
    world = worlds(dtype=torch.bfloat16)
    to_adapter(world / "official", world / "base", tmp_path / "adapter", progress=False)
    to_official(tmp_path / "adapter", world / "base", tmp_path / "back", progress=False)
    settings = json.loads((tmp_path / "back" / "config.json").read_text())
    assert settings["lora_r"] == RANK and settings["architectures"] == ["CovSVDLlamaForCausalLM"]
    assert set(settings["auto_map"]) == {"AutoConfig", "AutoModelForCausalLM"}
    model = kore.load_model(world / "base", device="cpu", dtype="float32")
    before = {role_of(name): p.clone() for name, p in model.named_parameters()}
    officialise(model, rank=settings["lora_r"]).load_state_dict(load_file(tmp_path / "back" / "model.safetensors"))
    for name, module in model.named_modules():
        if isinstance(module, RemoteLinear):
            assert torch.equal(module.weight_residual, before[f"{role_of(name)}.weight"])
    theirs = adapted_logits(world, tmp_path / "adapter", "llama")
    assert_near(logits(model, make_batch("llama")), theirs, 1e-6)


def renamed(checkpoint, target, rules, drop=(), rows=None):
    """A copy of a checkpoint in one file, under other names."""
    target.mkdir()
    stored, tensors = Checkpoint(checkpoint), {}
    for name in stored.tensors:
        new = name
        for old, replacement in rules:
            new = new.replace(old, replacement)
        tensor = stored[name].clone()
        if rows and new.endswith(("embed_tokens.weight", "lm_head.weight")):
            tensor = tensor[:rows].clone()
        if not name.startswith(tuple(drop)):
            tensors[new] = tensor
    save_file(tensors, target / "model.safetensors")
    shutil.copy(checkpoint / "config.json", target / "config.json")
    return target


def llava_names(checkpoint, target):
    """As the original LLaVA repository names them: no vision tower, no padded vocabulary."""
    rules = [
        ("model.language_model.", "language_model.model."),  # newer Hugging Face names, if they are on disk
        ("language_model.model.", "model."),
        ("language_model.lm_head", "lm_head"),
        ("multi_modal_projector.linear_1", "mm_projector.0"),
        ("multi_modal_projector.linear_2", "mm_projector.2"),
    ]
    renamed(checkpoint, target, rules, drop=("vision_tower", "model.vision_tower"), rows=300)
    if not any(name.startswith("model.mm_projector") for name in Checkpoint(target).tensors):
        moved = {
            (f"model.{name}" if name.startswith("mm_projector") else name): tensor.clone()
            for name, tensor in load_file(target / "model.safetensors").items()
        }
        save_file(moved, target / "model.safetensors")
    settings = {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu", "lora_r": 1}
    (target / "config.json").write_text(json.dumps(settings))
    return target


def test_names_of_the_original_llava_repository(worlds, tmp_path):
    world = worlds("llava")
    original = llava_names(world / "official", tmp_path / "original")
    names = Checkpoint(original).tensors
    assert "model.layers.0.mlp.up_proj.ALinear.weight" in names and "model.mm_projector.2.bias" in names
    to_adapter(world / "official", world / "base", tmp_path / "a", progress=False)
    to_adapter(original, world / "base", tmp_path / "b", progress=False)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)

    (original / "modeling_oursvd_llama.py").write_text("# remote code\n")
    to_official(tmp_path / "b", world / "base", tmp_path / "back", form="paper", like=original, progress=False)
    back = Checkpoint(tmp_path / "back")
    assert {name: stored.shape for name, stored in back.tensors.items()} == {n: s.shape for n, s in names.items()}
    settings = json.loads((tmp_path / "back" / "config.json").read_text())
    assert settings == {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu", "lora_r": RANK}
    assert (tmp_path / "back" / "modeling_oursvd_llama.py").read_text() == "# remote code\n"
    assert torch.equal(back["model.mm_projector.0.weight"], Checkpoint(original)["model.mm_projector.0.weight"])
    with pytest.raises(ModelError, match=r"llava-1\.5-7b-hf"):
        to_adapter(original, original, tmp_path / "c", progress=False)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "model."])
def test_every_name_of_a_weight_has_one_role(prefix):
    assert role_of(f"{prefix}layers.3.mlp.up_proj.BLinear.weight") == "layers.3.mlp.up_proj.BLinear.weight"
    assert role_of(f"{prefix}embed_tokens.weight") == "embed_tokens.weight"
    assert role_of("model.vision_tower.vision_tower.vision_model.encoder.layers.0.fc.bias") == role_of(
        "vision_tower.vision_model.encoder.layers.0.fc.bias"
    )
    assert role_of("visual.merger.mlp.0.weight") == role_of("model.visual.merger.mlp.0.weight")


def test_a_trained_a_is_refused_and_converted_on_request(worlds, tmp_path):
    world = worlds("qwen_vl", torch.bfloat16, factor="BLinear")
    with pytest.raises(ArtifactError, match=r"in 14 of 14 layers \(layers.0.*--trained-a"):
        to_adapter(world / "official", world / "base", tmp_path / "adapter", progress=False)
    assert not (tmp_path / "adapter").exists()
    done = to_adapter(world / "official", world / "base", tmp_path / "adapter", trained_a=True, progress=False)
    assert done.rank == 2 * RANK and max(done.remainders.values()) < 0.6
    ours = adapted_logits(world, tmp_path / "adapter", "qwen_vl")
    assert_near(ours, official_logits(world, "qwen_vl"), TOLERANCE[torch.bfloat16])
    assert not json.loads((tmp_path / "adapter" / "kore.json").read_text())["a_frozen"]


def changed(world, target, edit):
    """A copy of an official checkpoint in one file whose tensors ``edit`` has changed."""
    target.mkdir()
    stored = Checkpoint(world / "official")
    tensors = {name: stored[name].clone() for name in stored.tensors}
    edit(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


LAYER = "model.layers.1.self_attn.q_proj"


def test_another_base_is_refused(worlds, tmp_path):
    world = worlds()
    MODELS["llama"](seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ArtifactError, match="weights that an adapter does not carry are not those of the base"):
        to_adapter(world / "official", tmp_path / "other", tmp_path / "out", progress=False)
    MODELS["llama"](hidden_size=32).save_pretrained(tmp_path / "smaller")
    with pytest.raises(ArtifactError, match=r"expected \(\d+, \d+\) on this base"):
        to_adapter(world / "official", tmp_path / "smaller", tmp_path / "out", progress=False)
    same_rest = kore.load_model(world / "base", device="cpu")
    same_rest.get_submodule(LAYER).weight.data.mul_(1.01)
    same_rest.save_pretrained(tmp_path / "close")
    with pytest.raises(ArtifactError, match=r"in 1 of 14 layers \(layers.1.self_attn.q_proj\)"):
        to_adapter(world / "official", tmp_path / "close", tmp_path / "out", progress=False)
    with pytest.raises(ArtifactError, match="is not the model that was split"):
        to_adapter(world / "official", tmp_path / "close", tmp_path / "out", trained_a=True, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.BLinear.weight"), "q_proj.BLinear.weight is missing"),
        (lambda t: t.pop("model.norm.weight"), "norm.weight is missing"),
        (
            lambda t: t.update({f"{LAYER}.PALinear.weight": torch.ones(2, 2)}),
            "PALinear.weight is no weight of the base",
        ),
        (lambda t: t["model.embed_tokens.weight"].add_(0.1), "for example embed_tokens.weight"),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), "for example norm.weight"),
        (lambda t: t[f"{LAYER}.weight_residual"].fill_(float("nan")), "in 1 of 14 layers"),
        (lambda t: t.update({f"{LAYER}.BLinear.weight": torch.ones(4, 48)}), "ALinear.weight is"),
        (lambda t: [t.pop(name) for name in list(t) if name.endswith("weight_residual")], "not an official checkpoint"),
        (lambda t: t.update({"language_model.norm.weight": torch.ones(48)}), "are both norm.weight"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(worlds, tmp_path, edit, message):
    world = worlds()
    with pytest.raises(ArtifactError, match=message):
        to_adapter(changed(world, tmp_path / "changed", edit), world / "base", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_trained_bias_is_refused(worlds, tmp_path):
    world = worlds("qwen_vl")
    bias = next(name for name in Checkpoint(world / "official").tensors if name.endswith("q_proj.ALinear.bias"))
    broken = changed(world, tmp_path / "changed", lambda tensors: tensors[bias].add_(0.01))
    with pytest.raises(ArtifactError, match=r"for example layers.\d.self_attn.q_proj.bias"):
        to_adapter(broken, world / "base", tmp_path / "out", progress=False)


def test_broken_files_are_refused(worlds, tmp_path):
    world = worlds()
    broken = shutil.copytree(world / "official", tmp_path / "broken")
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=f"{shard.name}: not a readable safetensors file"):
        to_adapter(broken, world / "base", tmp_path / "out", progress=False)
    shard.unlink()
    with pytest.raises(ArtifactError, match=f"{shard.name}: no such file"):
        to_adapter(broken, world / "base", tmp_path / "out", progress=False)
    for file in broken.glob("*.safetensors*"):
        file.unlink()
    (broken / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"pickles.*safe_serialization=True"):
        to_adapter(broken, world / "base", tmp_path / "out", progress=False)
    with pytest.raises(ConfigError, match="choose another directory"):
        to_adapter(world / "official", world / "base", world / "base", progress=False)


def plain_lora(world, target, **options):
    model = kore.load_model(world / "base", device="cpu")
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options}
    model = get_peft_model(model, LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(target), save_embedding_layers=False)
    return target


@pytest.mark.parametrize("form", ["lossless", "paper"])
def test_a_plain_lora_on_some_layers(worlds, tmp_path, form):
    world = worlds()
    adapter = plain_lora(world, tmp_path / "adapter")
    to_official(adapter, world / "base", tmp_path / "out", form=form, progress=False)
    model = officialise(kore.load_model(world / "base", device="cpu"), rank=4)
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    assert_near(logits(model, make_batch("llama")), adapted_logits(world, adapter, "llama"), 1e-5)
    assert not model.model.layers[0].mlp.up_proj.ALinear.weight.any()


@pytest.mark.parametrize("form", ["lossless", "paper"])
def test_layers_of_different_ranks_are_padded(worlds, tmp_path, form):
    world = worlds()
    patterns = {"rank_pattern": {"v_proj": 3, "layers.1.self_attn.q_proj": 6}, "alpha_pattern": {"v_proj": 9}}
    adapter = plain_lora(world, tmp_path / "a", **patterns)
    done = to_official(adapter, world / "base", tmp_path / "out", form=form, progress=False)
    model = officialise(kore.load_model(world / "base", device="cpu"), rank=6)
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    assert done.rank == json.loads((tmp_path / "out" / "config.json").read_text())["lora_r"] == 6
    assert_near(logits(model, make_batch("llama")), adapted_logits(world, adapter, "llama"), 1e-5)
    layer = model.model.layers[0].self_attn.v_proj
    assert layer.BLinear.weight[:3].any(dim=1).all() and layer.ALinear.weight[:, :3].any()
    assert not layer.BLinear.weight[3:].any() and not layer.ALinear.weight[:, 3:].any()
    layer.requires_grad_()
    model(**make_batch("llama")).loss.backward()
    padding = (layer.BLinear.weight.grad[3:], layer.ALinear.weight.grad[:, 3:])
    assert not any(gradient.any() for gradient in padding) and layer.ALinear.weight.grad[:, :3].any()


@pytest.mark.parametrize("form", ["lossless", "paper"])
def test_an_adapter_whose_a_is_trained(worlds, tmp_path, form, caplog):
    world = worlds()
    base, batches = kore.load_model(world / "base", device="cpu"), [make_batch("llama", seed) for seed in range(3)]
    cov = kore.capture_covariance(base, batches, progress=False)
    model = kore.get_kore_model(base, cov, kore.KoreConfig(rank=5, train_a=True), progress=False)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name}
    for name, parameter in model.named_parameters():
        half = (slice(None), slice(5)) if "lora_B" in name else (slice(5),)
        if "lora_" in name:
            parameter.data[half] += 0.05 * torch.randn_like(parameter[half])
    save_adapter(model, tmp_path / "a")
    with caplog.at_level("WARNING", "kore"):
        done = to_official(tmp_path / "a", world / "base", tmp_path / "out", form=form, progress=False)
    assert done.rank == (5 if form == "paper" else 10)
    assert ("would train both halves" in caplog.text) == (form == "lossless")
    official = officialise(kore.load_model(world / "base", device="cpu"), rank=done.rank)
    official.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    assert_near(logits(official, make_batch("llama")), adapted_logits(world, tmp_path / "a", "llama"), 1e-5)
    if form == "paper":
        name = "model.layers.0.self_attn.q_proj"
        weight = load_file(world / "base" / "model.safetensors")[f"{name}.weight"].double()
        A0, B0 = (start[f"base_model.model.{name}.lora_{x}.default.weight"].double() for x in "AB")
        residual = official.get_submodule(name).weight_residual
        torch.testing.assert_close(residual.double(), weight - B0[:, :5] @ A0[:5], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"target_modules": ["lm_head", "q_proj"]}, "adapts lm_head"),
    ],
)
def test_adapters_without_an_official_form_are_refused(worlds, tmp_path, options, message):
    world = worlds()
    with pytest.raises(ArtifactError, match=message):
        to_official(plain_lora(world, tmp_path / "a", **options), world / "base", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_refused(worlds, tmp_path):
    world = worlds()
    to_adapter(world / "official", world / "base", tmp_path / "adapter", progress=False)
    MODELS["llama"](seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="belongs to another model"):
        to_official(tmp_path / "adapter", tmp_path / "other", tmp_path / "out", progress=False)
    with pytest.raises(ArtifactError, match="no official checkpoint of this model"):
        to_official(tmp_path / "adapter", world / "base", tmp_path / "out", like=world / "base", progress=False)


def test_our_own_adapter_goes_there_and_back(worlds, tmp_path):
    world = worlds("llava")
    model = kore.get_kore_model(
        kore.load_model(world / "base", device="cpu"),
        None,
        kore.KoreConfig(4, modules_to_save="auto", constraint="none"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save.default" in name:
            nn.init.normal_(parameter, std=0.05)
    save_adapter(model, tmp_path / "adapter")
    for form in ("lossless", "paper"):
        to_official(tmp_path / "adapter", world / "base", tmp_path / form, form=form, progress=False)
        done = to_adapter(tmp_path / form, world / "base", tmp_path / f"{form}-back", progress=False)
        assert done.projector
        ours, theirs = (
            load_file(tmp_path / name / "adapter_model.safetensors") for name in (f"{form}-back", "adapter")
        )
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert_near(ours[name], tensor, 2e-5)


def test_the_algebra_holds_where_rows_of_a_are_zero():
    torch.manual_seed(0)
    weight, A = torch.randn(9, 30, dtype=torch.float64), torch.randn(6, 30, dtype=torch.float64)
    A[2] = 0
    residual, B = split(weight, A)
    assert torch.allclose(B, weight @ torch.linalg.pinv(A))
    assert torch.allclose(residual + B @ A, weight) and torch.allclose(residual @ A.mT, torch.zeros(9, 6).double())
    found = initial_factor(weight, residual, A)
    assert torch.allclose(found.B, B) and found.remainder < 1e-2


def test_the_command_line_both_ways(worlds, tmp_path, capsys):
    world = worlds("llava", torch.bfloat16)
    adapter, back = str(tmp_path / "adapter"), str(tmp_path / "back")
    base = ["-m", str(world / "base")]
    assert main(["convert", str(world / "official"), *base, "-o", adapter]) == 0
    said = capsys.readouterr().out
    assert "adapter: " in said and "rank 5, 14 layers, with the trained projector" in said and "q_proj" in said
    assert main(["convert", adapter, *base, "-o", back, "--form", "paper"]) == 0
    captured = capsys.readouterr()
    assert "official checkpoint: " in captured.out and "--like" in captured.err
    assert main(["merge", *base, "-a", adapter, "-o", str(tmp_path / "merged")]) == 0
    merged = logits(kore.load_model(tmp_path / "merged", device="cpu", dtype="float32"), make_batch("llava"))
    assert_near(merged, official_logits(world, "llava"), 2 * TOLERANCE[torch.bfloat16])


def test_the_command_line_explains_itself(worlds, tmp_path, capsys):
    world = worlds()
    assert main(["convert", "--help"]) == 0
    assert "kore convert runs/official/checkpoint" in " ".join(capsys.readouterr().out.split())
    base = ["-m", str(world / "base"), "-o", str(tmp_path / "out")]
    for arguments, message in (
        ([str(world / "official"), *base, "--form", "paper"], "--form: only for an adapter as SOURCE"),
        ([str(tmp_path / "nowhere"), *base], "nowhere: no such directory"),
        ([str(world / "base"), *base], "not an official checkpoint"),
        ([str(world / "official"), "-m", "owner/name", *base[2:]], "a model of the hub must be downloaded first"),
    ):
        assert main(["convert", *arguments]) == 2
        assert message in capsys.readouterr().err
