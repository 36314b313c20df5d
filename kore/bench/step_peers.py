"""The models whose training steps are compared: one random base model, its layers adapted in different ways.

All of them share the tensors of the base model. Adapters of one rank start equal in every model, with a basis shared by
q, k and v and by gate and up, as KORE's are.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import kore
from kore.bench.official import official_linear
from kore.models import language_model_linears

FROZEN, OURS, MERGED, OFFICIAL, LIGER = (
    "frozen model",
    "kore.accelerate",
    "kore.accelerate, merged",
    "official form",
    "PEFT, A frozen, Liger",
)
Factors = list[tuple[str, Tensor, Tensor]]
_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a decoder stack."""

    layers: int
    width: int
    inner: int
    heads: int
    vocabulary: int


def random_llama(shape: LlamaShape, device: torch.device, dtype: torch.dtype) -> Any:
    """A LlamaForCausalLM with random weights, made where it is to run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
    )
    torch.manual_seed(0)
    with device:
        model: Any = LlamaForCausalLM(config)
    return model.to(dtype)


@dataclass
class Trained:
    """A model in training.

    Attributes:
        model: Called with a batch, it returns an output with a loss.
        Bs: B of every adapted linear layer, by the layer's name.
        inputs: The embedded tokens of the last forward pass, with their gradient after the backward pass.
    """

    model: Any
    Bs: dict[str, nn.Parameter] = field(default_factory=dict)
    inputs: Tensor | None = None

    def __post_init__(self) -> None:
        self.model.train()
        self.model.get_input_embeddings().register_forward_hook(self._take_inputs)

    def _take_inputs(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        self.inputs = output.requires_grad_()

    def parameters(self) -> list[nn.Parameter]:
        """What trains."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def sharing(base: nn.Module) -> Any:
    """A copy of the modules of ``base`` over the same tensors."""
    tensors = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, memo=dict(tensors))


def random_factors(base: nn.Module, rank: int) -> Factors:
    """Name, A and B of every linear layer of the language model; the same at every call.

    A_i = R_i Uᵀ has orthonormal rows, near to KORE's √Σ Vᵀ Uᵀ, and is rounded once.
    """
    generator = torch.Generator(device=next(base.parameters()).device).manual_seed(1)
    bases: dict[str, Tensor] = {}
    found: Factors = []
    for name in language_model_linears(base):
        weight: Any = base.get_submodule(name).weight
        d_out, d_in = weight.shape

        def normal(*shape: int, like: Tensor = weight) -> Tensor:
            return torch.randn(*shape, device=like.device, dtype=torch.float64, generator=generator)

        parent, _, last = name.rpartition(".")
        key = next((f"{parent}.{group[0]}" for group in _GROUPS if last in group), name)
        if key not in bases:
            bases[key] = torch.linalg.qr(normal(d_in, rank))[0]
        A = torch.linalg.qr(normal(rank, rank))[0] @ bases[key].T
        B = 0.1 * normal(d_out, rank) / rank**0.5
        found.append((name, A.to(weight.dtype), B.to(weight.dtype)))
    return found


def peft(base: nn.Module, factors: Factors, trained: bool = False) -> Trained:
    """PEFT's LoRA on every linear layer of the language model."""
    from peft import LoraConfig, get_peft_model

    inner = sharing(base)
    rank = factors[0][1].shape[0]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[name for name, _, _ in factors])
    model = get_peft_model(inner, config, autocast_adapter_dtype=False)
    if not trained:
        kore.freeze_a(model)
    Bs: dict[str, nn.Parameter] = {}
    with torch.no_grad():
        for name, A, B in factors:
            layer: Any = inner.get_submodule(name)
            layer.lora_A["default"].weight.copy_(A)
            Bs[name] = layer.lora_B["default"].weight
            Bs[name].copy_(B)
    return Trained(model, Bs)


def accelerated(base: nn.Module, factors: Factors, mode: str) -> Trained:
    """The same with its layers fused. Raises RuntimeError where ``kore.accelerate`` left one as it was.

    Merged whatever the accuracy: the gate is about the size of an update, the time is not.
    """
    trained = peft(base, factors)
    gate = {"gate": math.inf} if mode == "merged" else {}
    done = kore.accelerate(trained.model, mode=mode, **gate)
    if done.left or done.exact:
        raise RuntimeError(str(done))
    return trained


def official(base: nn.Module, factors: Factors) -> Trained:
    """The official linear layers, with the base weight as the residual."""
    inner = sharing(base)
    inner.requires_grad_(False)
    Bs: dict[str, nn.Parameter] = {}
    for name, A, B in factors:
        old: Any = inner.get_submodule(name)
        layer: Any = official_linear(old.weight, A, B.clone(), old.bias)
        inner.set_submodule(name, layer)
        Bs[name] = layer.ALinear.weight
    return Trained(inner, Bs)


def liger(base: nn.Module, factors: Factors) -> Trained:
    """PEFT with a frozen A on a Llama whose other operations are Liger's; its rotary one would change every model."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    patched = sharing(base)
    apply_liger_kernel_to_llama(rope=False, model=patched)
    return peft(patched, factors)


def no_liger(base: nn.Module) -> str | None:
    """Why Liger's operations cannot run, or None."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed"
    if next(base.parameters()).device.type != "cuda":
        return "liger_kernel needs a GPU"
    return None if type(base).__name__ == "LlamaForCausalLM" else "patched here for Llama alone"


def peft_name(rank: int, trained: bool = False) -> str:
    """As shown."""
    return f"PEFT r={rank}, A {'trained' if trained else 'frozen'}"


def builders(base: nn.Module, rank: int, lora_rank: int) -> dict[str, Callable[[], Trained]]:
    """Every contender that can run here by name, not built yet."""
    frozen = sharing(base)
    frozen.requires_grad_(False)
    at = cache(lambda rank: random_factors(base, rank))
    found = {
        FROZEN: lambda: Trained(frozen),
        peft_name(rank): lambda: peft(base, at(rank)),
        peft_name(lora_rank, trained=True): lambda: peft(base, at(lora_rank), trained=True),
        OURS: lambda: accelerated(base, at(rank), "exact"),
        MERGED: lambda: accelerated(base, at(rank), "merged"),
        OFFICIAL: lambda: official(base, at(rank)),
    }
    return found if no_liger(base) else {**found, LIGER: lambda: liger(base, at(rank))}
