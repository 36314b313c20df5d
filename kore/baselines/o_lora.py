"""O-LoRA: the new adapter's A is held orthogonal to that of the task before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from kore.baselines.lora import LoRA
from kore.baselines.previous import Previous, PreviousOrCovarianceOptions

if TYPE_CHECKING:
    from torch import nn

    from kore.covariance import CovarianceSet
    from kore.data import Conversation, Encoder
    from kore.protection.subspace import Orthogonality


class OLoRAOptions(PreviousOrCovarianceOptions):
    strength: float = Field(1.0, ge=0, allow_inf_nan=False, description="λ")
    form: Literal["overlap", "squared", "absolute"] = Field("overlap", description="how overlap is measured")


class OLoRA(LoRA):
    """A LoRA with the loss CE + λ · mean over the layers of r ‖A_old Aᵀ‖²_F / (‖A_old‖²_F ‖A‖²_F).

    A_old (r, d_in) is A of the task before; it is looked at and not trained. As B = 0 at the start, the model is the
    untouched one there. The history's ``old_overlap`` is the penalty without λ.

    *Unit.* ``form: overlap`` is 1 where both adapters read the same inputs, and r / d_in at random; λ is in nats for
    each new answer token. It is ours: the sum in the authors' code, λ Σ_layers Σ_ij |A_old Aᵀ|_ij with λ = 0.5 (``form:
    absolute``, ``strength: 0.5``), and that in their paper, of squares (``form: squared``), grow with r² and the layers
    until they dwarf the cross entropy. Their second term, on the size of the factors, is 0 in their settings and left
    out. Their A is the factor that reads the inputs in the code, and so it is here.

    *What is before.* On the first of its tasks O-LoRA is plain LoRA; what KORE took for a task before is not published.
    See :class:`kore.baselines.previous.PreviousOptions`. In a sequence of tasks O-LoRA answers with the sum of all
    adapters; here only the new one is kept, so that each method starts from the same model and ends as one adapter.

    Stored beside the adapter, while it trains: A_old; on disk, the adapter of the task before.
    """

    method = "o-lora"
    title = "O-LoRA"
    source = "Wang et al. 2023, arXiv 2310.14152"
    Options = OLoRAOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.reads_old = self.options.previous == "adapter"
        self.penalty_reads_covariance = self.options.previous == "covariance"

    def penalty(
        self,
        model: nn.Module,
        encoder: Encoder,
        old: Sequence[Conversation] = (),
        cov: CovarianceSet | None = None,
    ) -> Orthogonality:
        """Raises ConfigError where old conversations, or the covariance, are needed and missing."""
        from kore.protection.subspace import Orthogonality

        self.check_old(old)
        previous = Previous(self.options, encoder, old, cov)
        return Orthogonality(previous, self.options.strength, self.options.form)
