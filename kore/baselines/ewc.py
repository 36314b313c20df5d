"""Elastic weight consolidation: what old answers depend on moves little."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from kore.baselines.base import Options
from kore.baselines.full import FullFineTuning
from kore.baselines.lora import LoRA

if TYPE_CHECKING:
    from torch import nn

    from kore.covariance import CovarianceSet
    from kore.data import Conversation, Encoder
    from kore.protection.consolidation import Consolidation


class FullEWCOptions(Options):
    strength: float = Field(1.0, ge=0, allow_inf_nan=False, description="λ")
    labels: Literal["model", "data"] = Field("model", description="whose answers: drawn from the model, or the data's")
    samples: int | None = Field(256, ge=1, description="old conversations that count; null: all")


class EWCOptions(FullEWCOptions):
    over: Literal["parameters", "weights"] = Field("parameters", description="what F is of")


class EWC(LoRA):
    """A LoRA with the loss CE + (λ/2) Σ_i F_i (θ_i − θ₀_i)².

    F is the diagonal of the Fisher information on old conversations, F_i = (1/T) Σ_x (∂ Σ_t −log p(ŷ_t) / ∂θ_i)² over
    examples x with T answer tokens t in all, at θ₀, the start, once. ŷ is drawn from the model (``labels: model``, the
    definition) or is the answer of the data (``labels: data``, the "empirical" form). Gradients are squared example by
    example; squares of a batch's mean gradient, which some codes take, are up to a batch too small (van de Ven 2025,
    arXiv 2502.11756). ``samples`` old conversations are drawn by the seed, each old file in its share.

    *Unit.* F is per token and λ has the ½: at λ = 1 a nat lost on an old answer token costs what a nat on a new one
    does. It is 2 λ of two-sided protection, which has no ½. The history's ``old_divergence`` is ½ Σ F (θ − θ₀)².

    *What is protected.* ``over: parameters`` is the definition on what is trained: A, B and the projector. As a LoRA
    starts at B = 0, ∂L/∂A = s Bᵀ ∂L/∂ΔW = 0 there: F is exactly 0 on A, and B alone (with the projector) is held.
    ``over: weights`` holds the function that the adapter adds, (λ/2) Σ F_W ∘ (s B A)², with F_W of the adapted weights
    W₀, whatever A does, and the projector as before.

    KORE's λ is not published; its trained parameters are as many as LoRA's.

    Stored beside the adapter: F and θ₀, two numbers for each trained one; with ``over: weights`` one number for each
    adapted weight (26 GB in float32 for LLaVA-1.5-7B), in every process. On disk, F is in the run's penalty folder.
    """

    method = "ewc"
    title = "EWC"
    source = "Kirkpatrick et al. 2017, arXiv 1612.00796"
    reads_old = True
    Options = EWCOptions

    def penalty(
        self,
        model: nn.Module,
        encoder: Encoder,
        old: Sequence[Conversation] = (),
        cov: CovarianceSet | None = None,
    ) -> Consolidation:
        """Raises ConfigError where there are no old conversations."""
        self.check_old(old)
        return _consolidation(self.options, encoder, old, self.options.over)


class FullEWC(FullFineTuning):
    """Full fine-tuning with the penalty of :class:`EWC` on every trained parameter.

    Stored: F in float32 and θ₀, in every process (40 GB more for LLaVA-1.5-7B in bfloat16).
    """

    method = "ewc-full"
    title = "EWC, full fine-tuning"
    source = "Kirkpatrick et al. 2017, arXiv 1612.00796"
    reads_old = True
    Options = FullEWCOptions

    def penalty(
        self,
        model: nn.Module,
        encoder: Encoder,
        old: Sequence[Conversation] = (),
        cov: CovarianceSet | None = None,
    ) -> Consolidation:
        """Raises ConfigError where there are no old conversations."""
        self.check_old(old)
        return _consolidation(self.options, encoder, old, "parameters")


def _consolidation(options: FullEWCOptions, encoder: Encoder, old: Sequence[Conversation], over: str) -> Consolidation:
    from kore.protection.consolidation import Consolidation

    return Consolidation(old, encoder, options.strength, options.labels, over, options.samples)
