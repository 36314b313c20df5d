"""Learning without forgetting: on the new data the model also imitates what it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from kore.baselines.base import Options
from kore.baselines.lora import LoRA

if TYPE_CHECKING:
    from torch import nn

    from kore.covariance import CovarianceSet
    from kore.data import Conversation, Encoder
    from kore.protection.distillation import Distillation


class LwFOptions(Options):
    strength: float = Field(1.0, ge=0, allow_inf_nan=False, description="λ")
    temperature: float = Field(2.0, gt=0, allow_inf_nan=False, description="T, of both distributions")


class LwF(LoRA):
    """A LoRA with the loss CE + λ · (1/n) Σ T² KL(softmax(z₀/T) ‖ softmax(z/T)), summed over the n new answer tokens.

    z₀ are the logits of the untouched model on the new conversations; no old data is looked at. That model is the
    trained one with its adapter switched off, which also puts the original projector back: one more forward pass a
    step, no second copy of the weights. It runs without dropout. λ is in nats for each new token; T² keeps the size of
    the gradient that T takes away, and Hinton's form of the distillation differs from KL by a constant.

    Both sides predict the same token: logits are compared where an answer token is predicted, one position before it.
    As the adapter starts at B = 0, loss and gradient are exactly 0 in the first step.

    Li & Hoiem take λ = 1 and T = 2. On new facts the untouched model is wrong, so a large λ holds learning back.
    KORE's λ and T are not published.

    Stored beside the adapter: nothing.
    """

    method = "lwf"
    title = "LwF"
    source = "Li & Hoiem 2016, arXiv 1606.09282"
    Options = LwFOptions

    def penalty(
        self,
        model: nn.Module,
        encoder: Encoder,
        old: Sequence[Conversation] = (),
        cov: CovarianceSet | None = None,
    ) -> Distillation:
        """Raises ConfigError where the model has no adapter to switch off."""
        from kore.protection.distillation import Distillation

        return Distillation(model, self.options.strength, self.options.temperature)
