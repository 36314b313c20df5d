"""CIA: the result is a moving average of the weights, at a rate that follows the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from kore.baselines.base import Options
from kore.baselines.lora import LoRA

if TYPE_CHECKING:
    from torch import nn

    from kore.covariance import CovarianceSet
    from kore.data import Conversation, Encoder
    from kore.protection.averaging import Averaging


class CIAOptions(Options):
    rule: Literal["paper", "official", "constant"] = Field("paper", description="how β is chosen")
    beta: float = Field(0.99, ge=0, le=1, description="β where the rule's is not between 0 and 1")


class CIA(LoRA):
    """A LoRA whose result is θ*, θ*_t = β_t θ*_{t−1} + (1 − β_t) θ_t from θ*_0 = θ_0, over the steps of its training.

    θ are A, B and the projector, each tensor with a β of its own: ``rule: paper``, β = (‖L'‖ + 1) / (‖θ_t − θ*_{t−1}‖
    L''), L'' = ‖L'(θ_t) − L'(θ_{t−1})‖ / ‖θ_t − θ_{t−1}‖, norms L1. The authors' code does not divide by the change of
    θ, has a factor of 2, and puts the result on the other term: ``rule: official``. Where β is not between 0 and 1 both
    take 0.99; the history has the share of tensors where it was (``adaptive_beta``) and the mean (``mean_beta``).
    Gradients are as the optimizer gets them, so clipped by ``train.max_grad_norm``. ``rule: constant`` is an average at
    ``beta``.

    At β = 0.99, θ* follows training a hundred steps behind, and a short run learns less than LoRA. The paper's rule is
    far from that in the miniature: the median of β over the tensors falls from 0.56 in step 5 to 0.33 in step 120, so
    θ* is a mean of the last two steps or so. Steps being small at the end of a decaying schedule, the result gives the
    answers of LoRA, to the word.

    The other half of CIA, which decides by the words of the instructions whether a task of a sequence gets a new
    adapter, has nothing to decide where there is one task.

    Stored beside the adapter, while it trains: θ* and one gradient, for the paper's rule θ_{t−1} too; in checkpoints
    also. Data-parallel only, without DeepSpeed and FSDP.
    """

    method = "cia"
    title = "CIA"
    source = "Qiao et al. 2025, arXiv 2410.10868"
    Options = CIAOptions

    def penalty(
        self,
        model: nn.Module,
        encoder: Encoder,
        old: Sequence[Conversation] = (),
        cov: CovarianceSet | None = None,
    ) -> Averaging:
        """Adds nothing to the loss; follows the weights."""
        from kore.protection.averaging import Averaging

        return Averaging(self.options.rule, self.options.beta)
