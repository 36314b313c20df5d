"""MoELoRA: LoRA experts, weighed for each token by a router in each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from kore.baselines.base import Options, Preparation
from kore.baselines.lora import LoRA
from kore.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from kore.covariance import CovarianceSet
    from kore.data import Conversation, Encoder
    from kore.protection.routing import Guidance

_WEIGHTS = {"luo": 0.01, "coin": 0.0}


class MoELoRAOptions(Options):
    preset: Literal["luo", "coin"] = Field("luo", description="which of the two methods of this name")
    experts: int = Field(8, ge=1, description="N")
    top: int | Literal["all"] | None = Field(None, description="experts for a token; null: the preset's")
    balance: float | None = Field(None, ge=0, allow_inf_nan=False, description="weight; null: the preset's")
    contrastive: float | None = Field(None, ge=0, allow_inf_nan=False, description="weight; null: the preset's")
    temperature: float = Field(0.1, gt=0, allow_inf_nan=False, description="τ of the contrastive loss")
    tokens: int = Field(16, ge=2, description="tokens of a sequence that are contrasted")


class MoELoRA(LoRA):
    """y = W₀ x + s Σ_i p_i(x) B_i A_i x over N LoRA experts in every layer, p from a trained router W_g (N, d_in).

    Two methods have this name. ``preset: luo`` is what KORE cites: the top 2 of 8 experts by softmax(W_g x), with two
    losses beside the cross entropy. ``preset: coin`` is that of the code that KORE's authors point to (CoIN, arXiv
    2403.08350): softmax over all 8 experts and no further loss. Which of them made KORE's row is not published.

    *Balance.* N Σ_i f_i P_i, f_i the share of tokens routed to expert i, P_i its mean probability. *Contrast.* Of a
    token's expert outputs q = B_i A_i x, those of the same expert for other tokens (k₊) shall be nearer than those of
    other experts: −log [exp(q·k₊/τ) / (exp(q·k₊/τ) + Σ exp(q·k₋/τ))]. Means over the layers, and over the sequences by
    their answer tokens, so that splitting a step changes nothing; unit: nats for each new answer token.

    Ours, as it is not published: both weights 0.01, τ = 0.1, that the two gates are divided by their sum, that an
    output longer than 1 counts with length 1 (at the start all are 0, where a cosine has no gradient), and that 16
    evenly spaced tokens of each sequence are contrasted. A starts as LoRA's here; CoIN draws it from N(0, 0.01²).

    *Budget.* Experts and routers together have at most the parameters of a LoRA of ``rank``: experts' ranks differ by
    one where they do not divide, and some layers get one more. s = lora_alpha / rank, as that LoRA's. At the start B =
    0; with all experts p is about 1/N, so that the same learning rate moves it less than LoRA: tune it.

    The router computes in float32. The result is no stock adapter: KORE loads it, PEFT refuses it, and it cannot be
    merged.

    Stored beside the adapter: nothing. Under gradient checkpointing x Aᵀ of all layers stays in memory for the losses.
    """

    method = "moelora"
    title = "MoELoRA"
    source = "Luo et al. 2024, arXiv 2402.12851; Chen et al. 2024, arXiv 2403.08350"
    Options = MoELoRAOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        top = self.top
        if top is not None and not 1 <= top <= self.options.experts:
            raise ConfigError(f"options.top: expected 1 to {self.options.experts}, the experts, got {top}")

    @property
    def top(self) -> int | None:
        """How many experts a token goes to; None for all."""
        given = self.options.top
        if given is None:
            return min(2, self.options.experts) if self.options.preset == "luo" else None
        return None if given == "all" else int(given)

    def _weight(self, name: str) -> float:
        given = getattr(self.options, name)
        return _WEIGHTS[self.options.preset] if given is None else float(given)

    def wrap(self, model: nn.Module, names: Sequence[str], rank: int, alpha: int, how: Preparation) -> nn.Module:
        """Raises ConfigError where the rank is too small for the experts."""
        from kore.adapter.routed import routed_ranks, shapes_of, wrap_routed

        ranks = routed_ranks(shapes_of(model, names), rank, self.options.experts)
        scale, experts = alpha / rank, self.options.experts
        wrapped: Any = wrap_routed(model, ranks, experts, self.top, scale, how.modules_to_save, how.seed)
        wrapped.kore_info = {"routing": {"experts": experts, "top": self.top, "scale": scale, "ranks": ranks}}
        adapted: nn.Module = wrapped
        return adapted

    def penalty(
        self,
        model: nn.Module,
        encoder: Encoder,
        old: Sequence[Conversation] = (),
        cov: CovarianceSet | None = None,
    ) -> Guidance | None:
        """Balance and contrast; None where both weigh nothing."""
        from kore.protection.routing import Guidance

        weights = self._weight("balance"), self._weight("contrastive")
        return Guidance(*weights, self.options.temperature, self.options.tokens) if any(weights) else None
