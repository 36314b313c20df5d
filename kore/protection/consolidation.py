"""The penalty of elastic weight consolidation: a change costs what it did to answers on old data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from kore.distributed import Processes
from kore.errors import ConfigError, KoreError
from kore.models import base_model
from kore.penalty import Penalty, Start
from kore.processes import is_main_process
from kore.protection.fisher import diagonal_fisher, load_fisher, save_fisher

if TYPE_CHECKING:
    from kore.data import Conversation, Encoder

OVER = ("parameters", "weights")


class _Squares(torch.autograd.Function):
    """Σ F (θ − θ₀)², gradient 2 F (θ − θ₀). Keeps nothing but what is there already."""

    @staticmethod
    def forward(ctx: Any, now: torch.Tensor, start: torch.Tensor, F: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(now, start, F)
        return (now.to(F.dtype) - start).square_().mul_(F).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        now, start, F = ctx.saved_tensors
        return (now.to(F.dtype) - start).mul_(F).mul_(2 * grad).to(now.dtype), None, None


class _Product(torch.autograd.Function):
    """Σ F ∘ (s B A)² with the gradients 2 s (F ∘ sBA) Aᵀ of B and 2 s Bᵀ (F ∘ sBA) of A; s B A is not kept."""

    @staticmethod
    def forward(ctx: Any, B: torch.Tensor, A: torch.Tensor, F: torch.Tensor, s: float) -> torch.Tensor:
        with torch.autocast(B.device.type, enabled=False):
            change = (B.to(F.dtype) @ A.to(F.dtype)).mul_(s)
            weighed = F * change
            value = change.mul_(weighed).sum()
            ctx.save_for_backward(2 * s * weighed @ A.to(F.dtype).T, 2 * s * B.to(F.dtype).T @ weighed)
        ctx.dtypes = B.dtype, A.dtype
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        of_B, of_A = ctx.saved_tensors
        return (of_B * grad).to(ctx.dtypes[0]), (of_A * grad).to(ctx.dtypes[1]), None, None


class ParameterTerm:
    """Σ F (θ − θ₀)² of one parameter. It is looked up in its module, since FSDP2 replaces it."""

    def __init__(self, module: nn.Module, name: str, F: torch.Tensor) -> None:
        self._module, self._name, self.F = module, name, F
        self.start = getattr(module, name).detach().clone()

    def value(self) -> torch.Tensor:
        now = _whole(getattr(self._module, self._name))
        self.F, self.start = self.F.to(now.device), self.start.to(now.device)
        result: torch.Tensor = _Squares.apply(now, self.start, self.F)  # type: ignore[no-untyped-call]
        return result


class WeightTerm:
    """Σ F_W ∘ (s B A)² of one adapted layer."""

    def __init__(self, layer: Any, adapter: str, F: torch.Tensor) -> None:
        self._layer, self._adapter = layer, adapter
        self.F = F.T.contiguous() if getattr(layer, "fan_in_fan_out", False) else F

    def value(self) -> torch.Tensor:
        B, A = (_whole(getattr(self._layer, side)[self._adapter].weight) for side in ("lora_B", "lora_A"))
        self.F = self.F.to(B.device)
        scaling = float(self._layer.scaling[self._adapter])
        result: torch.Tensor = _Product.apply(B, A, self.F, scaling)  # type: ignore[no-untyped-call]
        return result


class Consolidation(Penalty):
    """(λ/2) Σ F_i (θ_i − θ₀_i)², θ₀ and F being those of the model before the first step.

    F is :func:`kore.protection.fisher.diagonal_fisher` of the old conversations, computed when training begins and kept
    in the run's folder. See :class:`kore.baselines.ewc.EWC` for the meaning of the arguments.

    Attributes:
        strength: λ.
        terms: What adds up; empty until training begins.
        divergence: ½ Σ F (θ − θ₀)² when it was last computed, a detached scalar.
    """

    def __init__(
        self,
        old: Sequence[Conversation],
        encoder: Encoder,
        strength: float = 1.0,
        labels: str = "model",
        over: str = "parameters",
        samples: int | None = None,
    ) -> None:
        self.strength, self.labels, self.over, self.samples = strength, labels, over, samples
        self.terms: list[ParameterTerm | WeightTerm] = []
        self.divergence: torch.Tensor | None = None
        self._old, self._encoder = list(old), encoder

    def identity(self) -> dict[str, Any]:
        from kore.training.identity import hash_data

        return {
            "consolidation": {
                "strength": self.strength,
                "labels": self.labels,
                "over": self.over,
                "samples": self.samples,
            },
            "old": hash_data(self._old, self._encoder),
        }

    def begin(self, start: Start) -> None:
        """Compute F, or read it where the run has it already.

        Raises:
            ConfigError: ``over`` is "weights" and the model has no adapter with B = 0 over plain weights.
            DataError: An old conversation cannot be encoded.
        """
        from kore.data.drawing import draw
        from kore.training.dataset import TrainingSet

        targets = self._targets(start.model)
        folder = start.folder / "fisher"
        F = load_fisher(folder)
        Processes().share(None)  # nobody writes before all have looked
        if F is None:
            drawn = self._old if self.samples is None else draw(self._old, self.samples, start.seed)
            examples = TrainingSet(drawn, start.encoder, start.on_bad_row)
            parameters = {name: target[2] for name, target in targets.items()}
            F = diagonal_fisher(start.model, parameters, start.encoder, examples, self.labels, start.seed)
            if is_main_process():
                save_fisher(F, folder, {**self.identity(), "examples": len(examples)})
        if self.over == "weights":
            silent = [name for name, target in targets.items() if target[1] is None and not F[name].any()]
            if silent:
                raise KoreError(f"{silent[0]}: no gradient of old answers came to its weight")
        self.terms = [
            ParameterTerm(holder, attribute, F[name])
            if attribute is not None
            else WeightTerm(holder, holder.active_adapters[0], F[name])
            for name, (holder, attribute, _) in targets.items()
        ]

    def _targets(self, model: nn.Module) -> dict[str, tuple[Any, str | None, nn.Parameter]]:
        """By name: where a protected parameter is held, under which name (None: W₀ of an adapted layer), and itself."""
        from peft.tuners.lora import LoraLayer

        found: dict[str, tuple[Any, str | None, nn.Parameter]] = {}
        seen: set[int] = set()  # tied weights are one parameter
        for path, module in base_model(model).named_modules():
            if self.over == "weights" and isinstance(module, LoraLayer):
                found[f"{path}.weight"] = (module, None, _base_weight(path, module))
            for name, parameter in module.named_parameters(recurse=False):
                factor = ".lora_" in f".{path}."
                if parameter.requires_grad and id(parameter) not in seen and not (self.over == "weights" and factor):
                    seen.add(id(parameter))
                    found[f"{path}.{name}"] = (module, name, parameter)
        if self.over == "weights" and not any(name is None for _, name, _ in found.values()):
            raise ConfigError("over: weights needs a LoRA adapter; for a model trained in full take parameters")
        return found

    def step(self) -> torch.Tensor:
        """The penalty, a scalar with the gradient λ F (θ − θ₀).

        Raises:
            KoreError: Training has not begun.
        """
        if not self.terms:
            raise KoreError("consolidation: F is not there yet; kore.train calls begin first")
        values = [term.value() for term in self.terms]
        half = torch.stack([value.to(values[0].device) for value in values]).sum() / 2
        self.divergence = half.detach()
        return half * self.strength

    def log(self) -> dict[str, float]:
        """The estimate of KL(old ‖ new) in nats for each old answer token."""
        return {} if self.divergence is None else {"old_divergence": float(self.divergence)}


def _base_weight(path: str, layer: Any) -> nn.Parameter:
    """W₀ of a LoRA layer, checked."""
    weight: nn.Parameter = layer.get_base_layer().weight
    adapters = layer.active_adapters
    if len(adapters) != 1 or adapters[0] not in layer.lora_B or layer.lora_B[adapters[0]].weight.any():
        raise ConfigError(f"over: weights needs one adapter whose B is 0; that of {path} is not")
    if not weight.is_floating_point() or type(weight) is not nn.Parameter:
        raise ConfigError(f"over: weights needs the gradient of {path}, which is quantised; take over: parameters")
    return weight


def _whole(parameter: Any) -> torch.Tensor:
    """A parameter that FSDP2 may have sharded; its gradient is cut into shards again."""
    whole: torch.Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return whole
