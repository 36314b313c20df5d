"""A LoRA whose blocks of rank are experts: a router weighs them anew for every token.

y = W₀ x + s Σ_i p_i(x) B_i A_i x, with p = softmax(W_g x) over all N experts, or over the k largest alone. A (r, d_in)
and B (d_out, r) are those of one PEFT layer; expert i is its own block of r.

It is no LoRA that stock PEFT could load: ``adapter_config.json`` names a ``peft_type`` of its own. It cannot be merged,
as the change of the weights depends on the input.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners import lora
from torch import nn

from kore.adapter.wrap import wrap_lora
from kore.errors import ArtifactError, ConfigError, KoreError
from kore.models import base_model, linear_shape, named_linears

if TYPE_CHECKING:
    from peft import PeftModel

_WEIGHTS = "adapter_model.safetensors"


class RoutedLinear(lora.Linear):
    """PEFT's LoRA layer with a router, whose weight is ``lora_router.<adapter>.weight`` (N, d_in), at least float32.

    Attributes:
        ranks: The rank of each expert, by adapter.
        top: k by adapter; None for all experts.
        recorder: Is given the probabilities, the gates and x Aᵀ of a forward pass, where there is one.
    """

    def __init__(self, target: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(target, adapter_name, *args, **kwargs)
        self.lora_router = nn.ModuleDict()
        self.adapter_layer_names = (*type(self).adapter_layer_names, "lora_router")
        self.ranks: dict[str, tuple[int, ...]] = {}
        self.top: dict[str, int | None] = {}
        self.recorder: Any = None

    def add_router(self, adapter: str, experts: int, top: int | None, scale: float, seed: int) -> None:
        """Cut the adapter into experts and give it a router with torch's start for a linear layer, U(±1/√d_in)."""
        A: Any = self.lora_A[adapter].weight
        self.ranks[adapter] = expert_ranks(len(A), experts)
        self.top[adapter] = None if top == experts else top
        self.scaling[adapter] = scale
        dtype = torch.promote_types(A.dtype, torch.float32)
        router = nn.Linear(A.shape[1], experts, bias=False, device=A.device, dtype=dtype)
        start = torch.rand(router.weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        router.weight.data.copy_((2 * start - 1) / A.shape[1] ** 0.5)
        self.lora_router[adapter] = router

    def route(self, x: torch.Tensor, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities and gates (..., N): the same, or with k the k largest, divided by their sum, and zeros."""
        weight: Any = self.lora_router[adapter].weight
        top = self.top[adapter]
        with torch.autocast(x.device.type, enabled=False):
            probabilities = nn.functional.linear(x.to(weight.dtype), weight).softmax(-1)
            if top is None:
                return probabilities, probabilities
            largest, places = probabilities.topk(top, dim=-1)
            shares = largest / largest.sum(-1, keepdim=True)
            return probabilities, torch.zeros_like(probabilities).scatter(-1, places, shares)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.pop("adapter_names", None) is not None:
            raise KoreError("routed experts: one adapter for a whole batch, not adapter_names")
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        dtype = result.dtype
        for adapter in self.active_adapters:
            if adapter not in self.lora_A:
                continue
            A: Any = self.lora_A[adapter]
            inner = A(self._cast_input_dtype(x, A.weight.dtype))
            probabilities, gates = self.route(x, adapter)
            if self.recorder is not None:
                self.recorder(self, adapter, probabilities, gates, inner)
            gates = gates.to(inner.dtype)
            wide = [gates[..., [i]].expand(*gates.shape[:-1], r) for i, r in enumerate(self.ranks[adapter])]
            result = result + self.lora_B[adapter](inner * torch.cat(wide, dim=-1)) * self.scaling[adapter]
        return result.to(dtype)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        raise KoreError(CANNOT_MERGE)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise KoreError(CANNOT_MERGE)


class RoutedModel(lora.LoraModel):
    """PEFT's LoRA model, which refuses to merge before it has changed anything."""

    def _check_merge_allowed(self) -> None:
        raise KoreError(CANNOT_MERGE)


ROUTED = "KORE_ROUTED_LORA"
"""The ``peft_type`` of a saved adapter."""
CANNOT_MERGE = (
    "an adapter of routed experts (method moelora) cannot be merged: its change of the weights depends on the input; "
    "use the model with its adapter"
)


def expert_ranks(rank: int, experts: int) -> tuple[int, ...]:
    """``rank`` shared out over the experts, the first ones getting one more where it does not divide."""
    least, more = divmod(rank, experts)
    return tuple(least + (number < more) for number in range(experts))


def routed_ranks(shapes: Mapping[str, tuple[int, int]], rank: int, experts: int) -> dict[str, int]:
    """The rank of each layer with which experts and routers have at most the parameters of a LoRA of rank ``rank``.

    T = ⌊(P − N Σ d_in) / Σ (d_in + d_out)⌋ of the budget P = R Σ (d_in + d_out), and one more in each layer, from the
    first, for which there is room.

    Args:
        shapes: (d_out, d_in) of the layers.
        rank: R.
        experts: N.

    Raises:
        ConfigError: The budget is too small for an expert of rank 1 each.
    """
    costs = {name: d_out + d_in for name, (d_out, d_in) in shapes.items()}
    left = rank * sum(costs.values()) - experts * sum(d_in for _, d_in in shapes.values())
    common = left // sum(costs.values())
    if common < experts:
        need = rank + experts - common
        raise ConfigError(
            f"rank: {experts} experts with their routers need a LoRA of rank {need} or so as budget, got {rank}; "
            "raise it or lower options.experts"
        )
    left -= common * sum(costs.values())
    ranks = dict.fromkeys(shapes, int(common))
    for name, cost in costs.items():
        if cost <= left and ranks[name] < min(shapes[name]):
            ranks[name] += 1
            left -= cost
    return ranks


def wrap_routed(
    model: nn.Module,
    ranks: Mapping[str, int],
    experts: int,
    top: int | None,
    scale: float,
    modules_to_save: str | Sequence[str] | None,
    seed: int,
) -> PeftModel:
    """A PeftModel with routed experts on the layers of ``ranks``: B zero, A by PEFT's rule, routers uniform.

    Raises ConfigError for a layer that is no ``nn.Linear``.
    """
    linears = named_linears(model)
    other = next((name for name in ranks if not isinstance(linears[name], nn.Linear)), None)
    if other is not None:
        raise ConfigError(f"targets: routed experts need nn.Linear, {other} is a {type(linears[other]).__name__}")
    peft_model = wrap_lora(model, list(ranks), ranks, None, modules_to_save, seed, layer=RoutedLinear)
    peft_model.base_model.__class__ = RoutedModel
    for name, layer in routed_layers(peft_model).items():
        adapter = layer.active_adapters[0]
        layer.add_router(adapter, experts, top, scale, zlib.crc32(f"{seed} {name}".encode()))
    return peft_model


def routed_layers(model: nn.Module) -> dict[str, RoutedLinear]:
    """By the name of the layer in the base model."""
    return {name: module for name, module in base_model(model).named_modules() if isinstance(module, RoutedLinear)}


def shapes_of(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of the layers."""
    linears = named_linears(model)
    return {name: linear_shape(linears[name]) for name in names}


def load_routed(model: nn.Module, directory: Path, info: Mapping[str, Any], trainable: bool) -> PeftModel:
    """Put a saved adapter of routed experts on its base model. Raises ArtifactError where its tensors do not fit."""
    from peft import set_peft_model_state_dict

    from kore.artifacts import load_tensors

    routing, config = info["routing"], info["config"]
    peft_model = wrap_routed(
        model,
        routing["ranks"],
        routing["experts"],
        routing["top"],
        routing["scale"],
        config["modules_to_save"],
        config["seed"],
    )
    tensors = load_tensors(directory / _WEIGHTS)
    try:
        outcome: Any = set_peft_model_state_dict(peft_model, tensors)
    except RuntimeError as error:
        raise ArtifactError(f"{directory / _WEIGHTS}: {str(error).strip().splitlines()[-1].strip()}") from error
    own = [name for name in outcome.missing_keys if ".lora_" in name or ".modules_to_save." in name]
    if own or outcome.unexpected_keys:
        name = (own or outcome.unexpected_keys)[0]
        raise ArtifactError(f"{directory / _WEIGHTS}: {name} is only in one of the file and the model")
    if not trainable:
        peft_model.requires_grad_(False)
        peft_model.eval()
    return peft_model
