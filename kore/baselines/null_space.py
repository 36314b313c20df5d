"""KORE and its neighbours: A is frozen in the null space or at random, or trained from there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kore.baselines.base import Baseline, Preparation
from kore.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


class RandomA(Baseline):
    """B; A is frozen in a random subspace, its scale computed as KORE's: KORE without its constraint."""

    method = "random-a"
    title = "Random frozen A"
    source = "LoRA-FA (Zhang et al. 2023, arXiv 2308.03303), and KORE's ablation (arXiv 2510.19316)"
    trains_a = False

    def prepare(self, model: nn.Module, how: Preparation) -> nn.Module:
        """A PeftModel around ``model``. Raises ConfigError for a missing rank or covariance."""
        from kore.adapter import KoreConfig, get_kore_model

        if how.rank is None:
            raise ConfigError(f"rank: expected a number for method {self.method!r}, got none")
        config = KoreConfig(
            rank=how.rank,
            targets=how.targets,
            modules_to_save=how.modules_to_save,
            scale=how.scale,
            constraint="null_space" if self.reads_covariance else "none",
            solver=how.solver,
            seed=how.seed,
            train_a=how.train_a or self.trains_a,
            strength=how.strength,
        )
        model = get_kore_model(model, how.cov, config, progress=how.progress, checkpoint=how.checkpoint)
        info: dict[str, Any] = model.kore_info  # type: ignore[assignment]
        info["method"] = self.method
        return model


class Kore(RandomA):
    """B; A is frozen in the null space of the old inputs. With ``train_a`` both, from the paper's A0 and B0."""

    method = "kore"
    title = "KORE"
    source = "arXiv 2510.19316, section 3.2"
    reads_covariance = True


class LoRANull1(Kore):
    """A and B; the adapter of ``kore`` with ``train_a``, to the bit.

    LoRA-Null has KORE's initialisation, KORE's code being derived from its: U from the r smallest singular values of C,
    svd(W0 U Uᵀ) = U* Σ V*ᵀ, B0 = U* √Σ, A0 = √Σ V*ᵀ. Its version 1 trains both factors, its version 2 freezes A. What
    sets it apart is outside: C is of text alone, 256 sequences of NQ-open questions with every token counted
    (``tokens="all"``), rows scaled by 1 / |max x| of their sequence (``normalize="official"``, as in KORE's code);
    there is no projector to train; rank 128 and learning rate 2e-5. Its code also trains the biases of adapted layers,
    which the Llama models it is for do not have; here they stay.
    """

    method = "lora-null-v1"
    title = "LoRA-Null v1"
    source = "Tang et al. 2025, arXiv 2503.02659"
    trains_a = True


class LoRANull2(LoRANull1):
    """B; the adapter of ``kore``, to the bit. See :class:`LoRANull1`."""

    method = "lora-null-v2"
    title = "LoRA-Null v2"
    trains_a = False
