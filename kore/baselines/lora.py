"""LoRA: both factors trained, on the layers and with the projector that KORE's adapter has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kore.baselines.base import Baseline, Preparation
from kore.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


class LoRA(Baseline):
    """A and B of a LoRA without dropout, A by PEFT's rule, ``lora_alpha`` 2 · rank unless given."""

    method = "lora"
    title = "LoRA"
    source = "Hu et al. 2022, arXiv 2106.09685"

    def prepare(self, model: nn.Module, how: Preparation) -> nn.Module:
        """A PeftModel around ``model``. Raises ConfigError for a rank that is missing, too large or ``"energy:τ"``."""
        from kore.adapter import resolve_rank
        from kore.adapter.wrap import check_unadapted
        from kore.models import model_fingerprint, resolve_targets

        if how.rank is None:
            raise ConfigError(f"rank: expected a number or match-lora-R for method {self.method!r}, got none")
        check_unadapted(model)
        names = resolve_targets(model, how.targets)
        rank = resolve_rank(model, names, how.rank, train_a=True)
        fingerprint = model_fingerprint(model)
        alpha = 2 * rank if how.lora_alpha is None else how.lora_alpha
        peft_model: Any = self.wrap(model, names, rank, alpha, how)
        own = getattr(peft_model, "kore_info", {})
        peft_model.kore_info = {
            "method": self.method,
            **self.describe(),
            "a_frozen": False,
            "rank": rank,
            **own,
            "config": {
                "rank": rank,
                "lora_alpha": alpha,
                "targets": how.targets,
                "modules_to_save": how.modules_to_save,
                "seed": how.seed,
            },
            "base_fingerprint": fingerprint,
        }
        adapted: nn.Module = peft_model
        return adapted

    def wrap(self, model: nn.Module, names: Sequence[str], rank: int, alpha: int, how: Preparation) -> nn.Module:
        """The PeftModel; what its ``kore_info`` holds is kept in that of :meth:`prepare`."""
        from kore.adapter.wrap import wrap_lora

        return wrap_lora(model, names, rank, alpha, how.modules_to_save, how.seed)
