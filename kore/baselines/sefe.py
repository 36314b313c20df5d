"""SEFE: answers in several styles, and a penalty on the elements of the weights that the task before changed most."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from kore.baselines.lora import LoRA
from kore.baselines.previous import Previous, PreviousOptions
from kore.baselines.styles import diversify

if TYPE_CHECKING:
    from torch import nn

    from kore.covariance import CovarianceSet
    from kore.data import Conversation, Encoder
    from kore.protection.key_elements import KeyElements

logger = logging.getLogger(__name__)


class SEFEOptions(PreviousOptions):
    strength: float = Field(2.5e3, ge=0, allow_inf_nan=False, description="λ of RegLoRA")
    elements: float = Field(0.02, gt=0, le=1, description="|K| over the elements of a layer")
    reglora: bool = Field(True, description="whether the penalty is there")
    asd: bool = Field(True, description="whether answers in other styles are")
    share: float = Field(0.2, ge=0, le=1, description="new conversations that get another style")


class SEFE(LoRA):
    """A LoRA on new conversations in several answer styles, with the loss CE + λ · mean_layers mean_{K} |B A|.

    *RegLoRA.* K are the ⌊0.02 · d_out · d_in⌋ elements of a layer where |B_old A_old| of the task before is largest.
    B A is without its scale s. λ = 2500 is the authors', in nats for each new answer token and unit of weight change:
    it is absolute, so another model wants another. As B = 0 at the start, loss and gradient are 0 there. What the task
    before is, KORE's authors do not say; see :class:`kore.baselines.previous.PreviousOptions`. The history's
    ``key_elements`` is the penalty without λ.

    *Answer-style diversification.* ``share`` of the new conversations are turned into other styles (yes/no, multiple
    choice, short, one sentence, detailed), equally many into each; the rest stay, and none are added. The authors have
    a language model write them; here rules do, from what the conversation and the answers of others say. See
    :mod:`kore.baselines.styles`. It is an augmentation of the new data: other methods do not have it.

    Each may be left out: ``asd: false`` is what MCITlib calls SEFE, ``reglora: false`` LoRA on more styles.

    Stored beside the adapter, while it trains: K, 4 bytes for each of 2 % of the adapted weights; on disk, the adapter
    of the task before.
    """

    method = "sefe"
    title = "SEFE"
    source = "Chen et al. 2025, arXiv 2505.02486"
    Options = SEFEOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.reads_old = self.options.reglora and self.options.previous == "adapter"
        self._counts: dict[str, Any] = {}

    def conversations(
        self, new: Sequence[Conversation], old: Sequence[Conversation] = (), seed: int = 0
    ) -> list[Conversation]:
        """The new ones, in their order, some in another style.

        How many in which is logged, and comes into ``kore.json`` with the :meth:`penalty` for the same data.
        """
        self.check_old(old)
        if not self.options.asd:
            return list(new)
        mixed = diversify(new, self.options.share, seed)
        logger.info("answer styles: %s", mixed)
        self._counts = {"conversations": len(mixed.conversations), "before": mixed.was, "changed_into": mixed.changed}
        return mixed.conversations

    def penalty(
        self,
        model: nn.Module,
        encoder: Encoder,
        old: Sequence[Conversation] = (),
        cov: CovarianceSet | None = None,
    ) -> KeyElements | None:
        """Raises ConfigError where old conversations are needed and missing."""
        from kore.protection.key_elements import KeyElements

        self.check_old(old)
        info: dict[str, Any] | None = getattr(model, "kore_info", None)
        if info is not None and self._counts:
            info["answer_styles"] = self._counts
        if not self.options.reglora:
            return None
        return KeyElements(Previous(self.options, encoder, old), self.options.strength, self.options.elements)
