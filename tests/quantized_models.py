"""Small Llamas with a quantised base and a frozen A, and the same computation in float64."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import tempfile

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_bnb_weight

import kore
from tests.tiny import tiny_llama

PACKAGES = {"nf4": "bitsandbytes", "fp4": "bitsandbytes", "int8": "bitsandbytes", "torchao": "torchao"}


def _absent(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


KINDS = [pytest.param(kind, marks=_absent(package)) for kind, package in PACKAGES.items()]
needs_bitsandbytes, needs_torchao = _absent("bitsandbytes"), _absent("torchao")

# Whole blocks of 64, which the packages ask for.
SIZES = {"hidden_size": 64, "intermediate_size": 128}


def quantised_base(kind, dtype=torch.float32):
    """tiny_llama, loaded with its linear layers quantised."""
    from packaging.version import Version
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig, __version__

    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    elif kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype)
    name = "dtype" if Version(__version__) >= Version("4.56") else "torch_dtype"
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        tiny_llama(**SIZES).save_pretrained(folder)
        try:
            return AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=config, device_map="cpu", **{name: dtype}
            )
        except (ImportError, RuntimeError, ValueError) as error:
            if Version(__version__) >= Version("5"):
                raise
            pytest.skip(f"transformers {__version__} does not load {kind} on a CPU: {error}")


def adapted(base, **config):
    """A PEFT model with a frozen A and a B that is not zero, both float32."""
    names = kore.models.language_model_linears(base)
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(**{"r": 5, "lora_alpha": 10, "target_modules": names, **config}))
    for name, parameter in kore.freeze_a(model).named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model.train()


def quantised(kind, dtype=torch.float32, **config):
    return adapted(quantised_base(kind, dtype), **config)


def lora_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def dequantised(base):
    """W of a quantised linear layer."""
    weight = base.weight
    if type(weight).__module__.startswith("torchao."):
        return weight.dequantize()
    return dequantize_bnb_weight(weight, getattr(base, "state", None) or weight.quant_state)


def exact(model):
    """The model with its weights dequantised, unfused, in float64."""
    twin = adapted(tiny_llama(**SIZES)).double()
    ours, theirs = lora_layers(model), lora_layers(twin)
    with torch.no_grad():
        for name, layer in theirs.items():
            layer.base_layer.weight.copy_(dequantised(ours[name].base_layer).double())
        for name, parameter in twin.named_parameters():
            if "base_layer" not in name:
                parameter.copy_(model.get_parameter(name).double())
    return twin
