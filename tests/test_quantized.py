"""Fused LoRA layers over quantised base weights, beside PEFT's own passes and the float64 expression."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch
from packaging.version import Version

import kore
import kore_kernels as kk
from kore.acceleration.quantized import FusedQuantized
from kore.adapter.factors import thin_init
from kore.errors import ModelError
from tests.acceleration_models import assert_same_step, step
from tests.batches import make_batch, make_batches
from tests.quantized_models import (
    KINDS,
    dequantised,
    exact,
    lora_layers,
    needs_bitsandbytes,
    needs_torchao,
    quantised,
    quantised_base,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def accelerated(model):
    done = kore.accelerate(model)
    assert not done.left and set(done.accelerated) == set(lora_layers(model)) and done.accelerated
    return model


def a_layer(model):
    return next(layer for name, layer in lora_layers(model).items() if name.endswith("up_proj"))


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_in_float32(kind):
    model = quantised(kind)
    theirs, true = step(model), step(exact(model))
    ours = step(accelerated(model))
    assert_same_step(ours, true, 1e-5)
    assert_same_step(ours, theirs, 0.02 if kind == "int8" else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
def test_bfloat16_is_as_close_to_float64_as_peft_is(kind, factors):
    model = quantised(kind, torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(factors)
    true, theirs = step(exact(model)), step(model)
    ours = step(accelerated(model))
    assert ours[0] == pytest.approx(true[0], rel=0.01)
    for name, gradient in true[1].items():
        error, peft_error = ((found[1][name] - gradient).norm() / gradient.norm() for found in (ours, theirs))
        assert error <= 1.5 * peft_error + 0.01, name


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    model = quantised(kind)
    layer, x = a_layer(model), torch.randn(2, 5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = step(model)
        accelerated(model)
        assert_same_step(step(model), theirs, 0.05)
        assert layer(x).dtype == x.dtype


@needs_bitsandbytes
def test_the_compute_dtype_of_4_bit_layers_is_that_of_bitsandbytes():
    x = torch.randn(3, 64)
    plain, ours = (
        a_layer(model) for model in (quantised("nf4", torch.bfloat16), accelerated(quantised("nf4", torch.bfloat16)))
    )
    expected, y = plain(x), ours(x)
    assert y.dtype == expected.dtype == torch.float32
    assert ours.base_layer.compute_dtype == plain.base_layer.compute_dtype
    assert (y - expected).norm() <= 2**-7 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradient_checkpointing(kind, reentrant, p):
    model = accelerated(quantised(kind, lora_dropout=p))
    model.enable_input_require_grads()
    torch.manual_seed(3)
    expected = step(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.manual_seed(3)
    assert_same_step(step(model), expected, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_that_of_the_fused_operation(kind):
    layer = a_layer(accelerated(quantised(kind, lora_dropout=0.4)))
    adapter = layer.active_adapters[0]
    A, B, W = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, dequantised(layer.base_layer)

    def run(call):
        x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        torch.manual_seed(5)
        y = call(x)
        return y, *torch.autograd.grad(y.square().sum(), (x, B))

    expected = run(lambda x: kk.lora_fa_linear(x, W, None, A, B, layer.scaling[adapter], dropout_p=0.4))
    for ours, theirs in zip(run(layer), expected):
        torch.testing.assert_close(ours, theirs)
    layer.eval()
    x = torch.randn(7, 64)
    torch.testing.assert_close(layer(x), kk.lora_fa_linear(x, W, None, A, B, layer.scaling[adapter]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_h_and_the_seed_are_all_that_is_saved(kind, p):
    layer = a_layer(accelerated(quantised(kind, lora_dropout=p)))
    x = torch.randn(3, 40, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    parameters = {parameter.data_ptr() for parameter in layer.parameters()}
    shapes = [tuple(tensor.shape) for tensor in kept if tensor.data_ptr() not in parameters]
    assert shapes == [(120, 16)] + [(1,)] * (p > 0)  # rank 5, padded; the seed
    kept.clear()
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.is_floating_point()]
    assert y.requires_grad and not any(t.shape == (128, 64) for t in alive)


@pytest.mark.parametrize("kind", KINDS)
def test_training_leaves_the_base_and_decelerate_gives_the_model_back(kind):
    model = quantised(kind)

    def base():
        return [bytes_of(layer.base_layer.weight) for layer in lora_layers(model).values()]

    classes, keys, before = [type(m) for m in model.modules()], list(model.state_dict()), base()
    accelerated(model)
    assert all(isinstance(layer, FusedQuantized) for layer in lora_layers(model).values())
    assert list(model.state_dict()) == keys
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(step(model)[0])
        optimizer.step()
    assert losses[-1] < losses[0] and base() == before
    ours = step(model)
    assert kore.decelerate(model) is model and [type(m) for m in model.modules()] == classes
    assert_same_step(ours, step(model), 0.02 if kind == "int8" else 1e-5)


def bytes_of(weight):
    data = getattr(weight, "qdata", weight.data)
    if hasattr(data, "tensor_impl"):
        data = data.tensor_impl.get_plain()[0]
    return data.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_inference_and_a_disabled_adapter_run_as_peft_does(kind):
    model = quantised(kind).eval()
    batch = make_batch("llama")

    def logits():
        with torch.no_grad():
            return model(**batch).logits

    def both():
        adapted = logits()
        with model.disable_adapter():
            return adapted, logits()

    theirs = both()
    kore.accelerate(model)
    for ours, expected in zip(both(), theirs):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_on_the_parts_of_a_layer_are_called(kind):
    layer = a_layer(accelerated(quantised(kind)))
    for part in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
        calls = []
        handle = part.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        layer(torch.randn(3, 64))
        handle.remove()
        layer(torch.randn(3, 64))
        assert len(calls) == 1


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.8"), reason="this torch compiles no layer whose weight is a tensor subclass"
)
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_break(kind):
    layer = a_layer(accelerated(quantised(kind)))
    x = torch.randn(2, 7, 64, requires_grad=True)
    y, expected = torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)
    torch.testing.assert_close(y, expected)
    (ours,) = torch.autograd.grad(y.square().sum(), x)
    (theirs,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_mode_is_refused(kind):
    done = kore.accelerate(quantised(kind), mode="merged")
    assert done.exact.keys() == set(done.accelerated) and "no merged mode" in str(done)


def why(model):
    done = kore.accelerate(model)
    assert not done.accelerated
    (reason,) = set(done.left.values())
    return reason


@needs_bitsandbytes
def test_what_is_left_is_said():
    trained = quantised("nf4")
    for name, parameter in trained.named_parameters():
        parameter.requires_grad = "lora_" in name
    assert "kore.freeze_a" in why(trained)
    assert "DoRA" in why(quantised("nf4", use_dora=True))
    packed = quantised("nf4")
    for layer in lora_layers(packed).values():
        layer.base_layer.weight.quant_state.packing_format_for_cpu = True
    assert "packed" in why(packed)
    bare = quantised("int8")
    for layer in lora_layers(bare).values():
        layer.base_layer.weight.SCB = layer.base_layer.state.SCB = None
    assert "scales" in why(bare)


@needs_torchao
def test_quantised_activations_are_left_to_torchao():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    from tests.quantized_models import adapted
    from tests.tiny import tiny_llama

    base = tiny_llama()
    quantize_(base, Int8DynamicActivationInt8WeightConfig(), lambda module, name: name.endswith("q_proj"))
    model = adapted(base, target_modules=["q_proj"])
    assert "its input too" in why(model)


def test_kore_does_not_import_the_packages():
    code = """
import sys, kore
packages = {"bitsandbytes", "torchao", "deepspeed"}
assert not packages & set(sys.modules)
import peft.tuners.lora  # PEFT does, where they are installed
packages -= set(sys.modules)
import kore.acceleration.run
assert "kore.acceleration.quantized" in sys.modules and not packages & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_init_takes_the_dequantised_weights(kind):
    base = quantised_base(kind)
    names = kore.models.language_model_linears(base)
    weights = {name: dequantised(base.get_submodule(name)).double() for name in names}
    covariance = kore.capture_covariance(base, make_batches("llama"), progress=False)
    if any(getattr(getattr(p, "quant_state", None), "packing_format_for_cpu", False) for p in base.parameters()):
        with pytest.raises(ModelError, match=f"{names[0]}: .*load the model again"):
            kore.get_kore_model(base, covariance, kore.KoreConfig(rank=5), progress=False)
        base = quantised_base(kind)
    made = kore.get_kore_model(base, covariance, kore.KoreConfig(rank=5), progress=False)
    for name in names:
        expected = thin_init(weights[name], kore.null_space(covariance[name], 5).basis)
        A = made.base_model.model.get_submodule(name).lora_A["default"].weight.detach().double()
        torch.testing.assert_close(A.mT @ A, expected.mT @ expected, rtol=1e-4, atol=1e-6)
