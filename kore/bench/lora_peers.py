"""The ways to compute linear layers with a low-rank update that ``lora_fa_linear`` is measured beside.

Each peer says why it cannot run, or builds from the layers of a case a forward pass with its trained parameters. PEFT's
layers are made by PEFT, their adapters in x's dtype, which is its fastest form.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kore.bench.lora_layers import Case, Layers
from kore.bench.official import official_linear

FROZEN = "frozen F.linear"
OURS, MERGED, GROUP = "lora_fa_linear", "lora_fa_linear, merged", "lora_fa_linears"
PEFT, PEFT_TRAINED, PEFT_COMPILED = "PEFT, A frozen", "PEFT, A trained", "PEFT, A frozen, compiled"
OFFICIAL = "official module"


@dataclass(frozen=True)
class Built:
    """A forward pass from x to every output, the Bs that train in it, and what else trains."""

    forward: Callable[[Tensor], Sequence[Tensor]]
    Bs: Sequence[Tensor] = ()
    others: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Peer:
    """One way to do it.

    Attributes:
        name: As shown.
        refusal: Why it cannot run a case on a device, or None.
        build: From the layers.
    """

    name: str
    refusal: Callable[[Case, torch.device], str | None]
    build: Callable[[Layers], Built]


def _always(case: Case, device: torch.device) -> str | None:
    return None


def _trained(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


def _frozen(layers: Layers) -> Built:
    return Built(lambda x: [F.linear(x, W) for W in layers.weights])


def _singly(merged: bool) -> Callable[[Layers], Built]:
    def build(layers: Layers) -> Built:
        import kore_kernels as kk

        Bs = _trained(layers.Bs)
        parts = list(zip(layers.weights, layers.As, Bs))
        if merged:
            return Built(lambda x: [kk.lora_fa_linear(x, W, None, A, B, merged=True) for W, A, B in parts], Bs)
        return Built(lambda x: [kk.lora_fa_linear(x, W, None, A, B) for W, A, B in parts], Bs)

    return build


def _group(layers: Layers) -> Built:
    import kore_kernels as kk

    Bs, no_bias = _trained(layers.Bs), [None] * len(layers.Bs)
    return Built(lambda x: kk.lora_fa_linears(x, layers.weights, no_bias, layers.U, layers.Rs, Bs), Bs)


def _one_layer(case: Case, device: torch.device) -> str | None:
    return "one layer is no group" if len(case.d_out) == 1 else None


class Parallel(nn.Module):
    """Linear layers without bias, of given weights, that read one input."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for weight in weights:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=False)
            self.layers.append(layer)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def _peft(trained: bool = False, compiled: bool = False) -> Callable[[Layers], Built]:
    def build(layers: Layers) -> Built:
        from peft import LoraConfig, get_peft_model

        module, rank = Parallel(layers.weights), layers.U.shape[1]
        names = [f"layers.{i}" for i in range(len(layers.weights))]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
        get_peft_model(module, config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
        adapted: Any = list(module.layers)
        for layer, A, B in zip(adapted, layers.As, layers.Bs):
            layer.lora_A["default"].weight = nn.Parameter(A.clone() if trained else A, requires_grad=trained)
            layer.lora_B["default"].weight = nn.Parameter(B.clone())
        Bs = [layer.lora_B["default"].weight for layer in adapted]
        As = [layer.lora_A["default"].weight for layer in adapted] if trained else []
        if not compiled:
            return Built(module, Bs, As)
        torch.compiler.reset()  # else its limit on recompilations would end a run of many cases in eager mode
        return Built(torch.compile(module, fullgraph=True, dynamic=False), Bs, As)

    return build


def _no_compiler(case: Case, device: torch.device) -> str | None:
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "torch.compile needs a C++ compiler on the CPU; install one or name it in CXX"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs Triton, which is not installed"
    return None


def _official(layers: Layers) -> Built:
    modules = [official_linear(W, A, B.clone()) for W, A, B in zip(layers.weights, layers.As, layers.Bs)]
    return Built(lambda x: [module(x) for module in modules], [module.ALinear.weight for module in modules])


def _unsloth(layers: Layers) -> Built:
    from unsloth.kernels.fast_lora import LoRA_W

    parts = list(zip(layers.weights, layers.As, _trained(layers.Bs)))
    return Built(
        lambda x: [LoRA_W.apply(x[None], W, None, A, B, 1.0)[0] for W, A, B in parts], [B for _, _, B in parts]
    )


def _lorafusion(layers: Layers) -> Built:
    from lorafusion.ops.lora_v1 import fused_linear_lora

    parts = list(zip(layers.weights, layers.As, _trained(layers.Bs)))
    return Built(lambda x: [fused_linear_lora(x[None], W, A, B, 1.0)[0] for W, A, B in parts], [B for _, _, B in parts])


def _needs(package: str) -> Callable[[Case, torch.device], str | None]:
    def refusal(case: Case, device: torch.device) -> str | None:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        return None if device.type == "cuda" else f"{package} needs a GPU"

    return refusal


PEERS = (
    Peer(FROZEN, _always, _frozen),
    Peer(OURS, _always, _singly(merged=False)),
    Peer(MERGED, _always, _singly(merged=True)),
    Peer(GROUP, _one_layer, _group),
    Peer(PEFT, _always, _peft()),
    Peer(PEFT_TRAINED, _always, _peft(trained=True)),
    Peer(PEFT_COMPILED, _no_compiler, _peft(compiled=True)),
    Peer(OFFICIAL, _always, _official),
    Peer("Unsloth LoRA_W", _needs("unsloth"), _unsloth),
    Peer("LoRAFusion", _needs("lorafusion"), _lorafusion),
)


def select(case: Case, device: torch.device) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can run a case, the frozen layers and ours first, and why the others cannot."""
    reasons = {peer.name: peer.refusal(case, device) for peer in PEERS}
    running = [peer for peer in PEERS if reasons[peer.name] is None]
    return running, {name: reason for name, reason in reasons.items() if reason}
