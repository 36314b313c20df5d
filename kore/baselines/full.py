"""Full fine-tuning: every parameter of the language model and the projector, none of the vision tower."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from kore.baselines.base import Baseline, Preparation

if TYPE_CHECKING:
    from torch import nn


class FullFineTuning(Baseline):
    """Trains the language model with its embeddings and output head, and the projector; of a text-only model all."""

    method = "full"
    title = "Full fine-tuning"
    source = "LLaVA's second stage (Liu et al. 2023, arXiv 2304.08485)"
    in_full = True

    def prepare(self, model: nn.Module, how: Preparation) -> nn.Module:
        """Sets the flags of ``model`` in place and returns it. ``how`` has no say."""
        from kore.adapter.wrap import check_unadapted

        check_unadapted(model)
        return train_in_full(model)


def train_in_full(model: Any) -> nn.Module:
    """Let gradients reach everything but the vision tower; in place."""
    from kore.models import has_vision, language_model_linears, projector_name

    if not has_vision(model):
        trained: nn.Module = model.requires_grad_(True)
        return trained
    model.requires_grad_(False)
    layers = os.path.commonpath([name.replace(".", "/") for name in language_model_linears(model)]).replace("/", ".")
    parts = [model.get_submodule(layers.rpartition(".")[0])]
    parts += [model.get_input_embeddings(), model.get_output_embeddings()]
    projector = projector_name(model)
    if projector is not None:
        parts.append(model.get_submodule(projector))
    for module in parts:
        if module is not None:
            module.requires_grad_(True)
    whole: nn.Module = model
    return whole
