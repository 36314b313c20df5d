"""Models as people have them: quantised, spread out by accelerate, with hooks of their own."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from kore.capture import capture_covariance
from kore.covariance import merge_covariance
from kore.models import model_fingerprint
from kore.nullspace import null_space
from tests.batches import MODELS, make_batches

capture = functools.partial(capture_covariance, progress=False)


def same(first, second) -> None:
    assert first.groups == second.groups
    for name in first.modules:
        assert torch.equal(first[name].cpu(), second[name].cpu()), name


@pytest.mark.parametrize("kind", ["llava", "qwen_vl", "llama"])
def test_layers_on_the_host_and_on_disk(kind, tmp_path):
    from accelerate import dispatch_model

    batches = make_batches(kind, 2)
    plain = capture(MODELS[kind](), batches)
    model = MODELS[kind]()
    on_disk = next(name for name, _ in model.named_modules() if name.endswith(".layers.1") and "vision" not in name)
    own = {name.rpartition(".")[0] for name in model.state_dict()}
    first = next(iter(model.state_dict())).rpartition(".")[0]
    away = (on_disk, first)
    place = {name: "cpu" for name in own if not name.startswith(tuple(f"{part}." for part in away))}
    place |= dict.fromkeys(away, "disk")
    dispatched = dispatch_model(model, place, offload_dir=str(tmp_path), force_hooks=True)
    assert next(dispatched.parameters()).is_meta
    forwards = {module: module.forward for module in dispatched.modules()}
    cov = capture(dispatched, batches)
    same(cov, plain)
    assert cov.fingerprint["weights"] is None and cov.fingerprint["structure"] == plain.fingerprint["structure"]
    assert all(module.forward == forward for module, forward in forwards.items())
    assert next(dispatched.parameters()).is_meta


def test_from_pretrained_with_a_device_map(tmp_path):
    from kore.models import load_model
    from tests.tiny import save_tiny

    batches = make_batches("llava", 2)
    plain = capture(load_model(save_tiny("llava", tmp_path / "m"), device="cpu"), batches)
    spread = load_model(
        tmp_path / "m", device_map="auto", max_memory={"cpu": 10**9}, offload_folder=str(tmp_path / "o")
    )
    same(capture(spread, batches), plain)


class PackedLinear(nn.Module):
    """A linear layer with a quantised weight, as the common libraries make them."""

    def __init__(self, linear: nn.Linear, tensor: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().max() / 127
        codes = (linear.weight.detach() / self.scale).round().to(torch.int8)
        if tensor:
            self.weight = nn.Parameter(codes.reshape(-1, 1), requires_grad=False)
        else:
            self.weight = lambda: codes
        self.codes = codes

    def forward(self, x):
        return x @ (self.codes.to(x.dtype) * self.scale).T


def quantised(tensor: bool) -> nn.Module:
    model = MODELS["llama"]()
    for layer in model.model.layers:
        for block, names in ((layer.self_attn, "qkvo"), (layer.mlp, ("gate", "up", "down"))):
            for name in names:
                linear = getattr(block, f"{name}_proj")
                setattr(block, f"{name}_proj", PackedLinear(linear, tensor))
    return model


@pytest.mark.parametrize("tensor", [True, False], ids=["codes", "method"])
def test_quantised_layers_are_captured_like_their_dequantised_twins(tensor):
    model, twin, batches = quantised(tensor), MODELS["llama"](), make_batches("llama", 2)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            twin.get_submodule(name).weight.data = module.codes * module.scale
    cov = capture(model, batches)
    assert [len(group.modules) for group in cov.groups] == [3, 1, 2, 1] * 2
    assert cov.fingerprint["weights"] is None
    plain = capture(twin, batches)
    for name in cov.modules:
        torch.testing.assert_close(cov[name], plain[name], rtol=1e-4, atol=1e-4)


def test_a_weight_of_a_tensor_class_that_cannot_be_indexed():
    class Opaque(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            name = getattr(func, "__name__", "")
            if name in ("reshape", "view", "__getitem__"):
                raise NotImplementedError(name)
            result = super().__torch_function__(func, types, args, kwargs or {})
            return result.as_subclass(torch.Tensor) if name == "linear" else result

    model = MODELS["llama"]()
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Opaque), requires_grad=False)
    assert model_fingerprint(model)["weights"] is None
    assert len(capture(model, make_batches("llama", 1)).groups) == 8


def test_hooks_of_others_run_and_what_they_change_is_captured():
    model, batches = MODELS["llama"](), make_batches("llama", 2)
    plain = capture(model, batches)
    layer = model.model.layers[0]

    def double(module, args, kwargs):
        return tuple(2 * value for value in args), kwargs

    mine = [
        layer.mlp.down_proj.register_forward_pre_hook(double, with_kwargs=True),
        layer.self_attn.k_proj.register_forward_pre_hook(lambda module, args: (args[0].clone(),)),
        model.register_forward_hook(lambda module, args, output: None, always_call=True),
    ]
    cov = capture(model, batches)
    assert [len(group.modules) for group in cov.groups][:2] == [2, 1] and len(cov.groups) == 9
    torch.testing.assert_close(cov["model.layers.0.mlp.down_proj"], 4 * plain["model.layers.0.mlp.down_proj"])
    assert len(layer.mlp.down_proj._forward_pre_hooks) == len(layer.self_attn.k_proj._forward_pre_hooks) == 1
    for handle in mine:
        handle.remove()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    same(capture(model, batches), plain)


def test_inputs_given_by_keyword():
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, input_ids):
            return self.a(input=input_ids)

    x = torch.randn(2, 3, 4)
    cov = capture(Keyword(), [{"input_ids": x}])
    torch.testing.assert_close(cov["a"], x.reshape(-1, 4).T @ x.reshape(-1, 4))


def test_one_capture_serves_every_rank_and_merges_with_another_data_set():
    model = MODELS["llava"]()
    first, second = capture(model, make_batches("llava", 2)), capture(model, make_batches("llava", 4)[2:])
    cov = merge_covariance([first, second])
    same_data = capture(model, make_batches("llava", 4))
    name = cov.modules[-1]
    torch.testing.assert_close(cov[name], same_data[name], rtol=1e-4, atol=1e-4)
    assert cov.groups == same_data.groups
    bases = [null_space(cov[name], rank).basis for rank in (4, 9)]
    assert [basis.shape for basis in bases] == [(80, 4), (80, 9)]
    assert float((bases[1].T @ bases[0]).svd().S.min()) > 0.99
