"""What a method for sequences of tasks takes for the task before, where there is none but pre-training.

O-LoRA and RegLoRA are plain LoRA on the first of their tasks. Here the old data stand for a task before: see
:class:`PreviousOptions`. None of this is published for KORE's rows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from kore.baselines.base import Options
from kore.errors import ConfigError
from kore.protection.adapted import Factors, adapted_layers, at_least_float32

if TYPE_CHECKING:
    from kore.covariance import CovarianceSet
    from kore.data import Conversation, Encoder
    from kore.penalty import Start


class PreviousOptions(Options):
    """Where the task before comes from.

    "adapter": a LoRA of the same rank, on the same layers, with the same settings, trained on the old conversations for
    ``previous_steps``. The model then starts from its untouched weights and A, so nothing of it is in the result; it
    stays in the run's penalty folder. "weights": the r largest singular values of W0 with their vectors, without any
    data. "none": no task before, which is plain LoRA.
    """

    previous: Literal["adapter", "weights", "none"] = Field("adapter", description="what stands for the task before")
    previous_steps: int = Field(200, ge=1, description="steps of the adapter on old data")


class PreviousOrCovarianceOptions(PreviousOptions):
    """As above, and "covariance": the r eigenvectors of the largest eigenvalues of the old inputs' covariance C; no B.
    That protects the inputs and not a task, which is nearer to GPM (arXiv 2103.09762) and InfLoRA (2404.00228)."""

    previous: Literal["adapter", "weights", "covariance", "none"] = Field(  # type: ignore[assignment]
        "adapter", description="what stands for the task before"
    )


class Previous:
    """The change of the task before, found when training begins.

    Args:
        options: Where it comes from.
        encoder: That of the model.
        old: Old conversations, for "adapter".
        cov: For "covariance".
    """

    def __init__(
        self,
        options: PreviousOptions,
        encoder: Encoder,
        old: Sequence[Conversation] = (),
        cov: CovarianceSet | None = None,
    ) -> None:
        if options.previous == "covariance" and cov is None:
            raise ConfigError(
                "options.previous: covariance needs the result of kore capture (kore train: --covariance)"
            )
        self.source, self.steps = options.previous, options.previous_steps
        self._encoder, self._old, self._cov = encoder, list(old), cov

    def identity(self) -> dict[str, Any]:
        """What it depends on, JSON-serialisable."""
        from kore.training.identity import hash_data

        found: dict[str, Any] = {"previous": self.source}
        if self.source == "adapter":
            found |= {"steps": self.steps, "old": hash_data(self._old, self._encoder)}
        if self._cov is not None:
            found["covariance"] = {name: self._cov.digest(name) for name in sorted(self._cov.modules)}
        return found

    def factors(self, start: Start) -> Mapping[str, Factors]:
        """The change of every adapted layer, by the layer's name; empty for "none". B A is without the scale s.

        The model is as before afterwards, to the bit. Call it in every process.
        """
        if self.source == "adapter":
            return self._trained(start)
        return {} if self.source == "none" else self._computed(start)

    def _computed(self, start: Start) -> dict[str, Factors]:
        found: dict[str, Factors] = {}
        for name, layer in adapted_layers(start.model).items():
            A = layer.A.detach()
            rank, dtype = len(A), at_least_float32(A)
            if self.source == "covariance":
                assert self._cov is not None
                _, vectors = torch.linalg.eigh(self._cov[name].to(torch.float64))
                found[name] = Factors(vectors[:, -rank:].T.flip(0).to(A.device, dtype))
            else:
                U, S, V = torch.linalg.svd(layer.base_weight().to(dtype), full_matrices=False)
                found[name] = Factors(V[:rank].clone(), U[:, :rank] * S[:rank])
        return found

    def _trained(self, start: Start) -> dict[str, Factors]:
        """Train the model on old data, take the factors, and put everything back."""
        from kore.training import train
        from kore.training.config import TrainConfig

        if start.config is not None and (start.config.fsdp or start.config.deepspeed):
            raise ConfigError(
                "options.previous: adapter is trained data-parallel, without fsdp and deepspeed; "
                "take previous: weights, or leave them out"
            )
        model: Any = start.model
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        modes, info = {module: module.training for module in model.modules()}, getattr(model, "kore_info", None)
        if info is not None:
            same = ("a_frozen", "rank", "config", "base_fingerprint")
            model.kore_info = {"method": "lora", **{key: copy.deepcopy(info[key]) for key in same if key in info}}
        own = {"max_steps": self.steps, "on_bad_row": start.on_bad_row, "report_to": [], "seed": start.seed}
        config = TrainConfig.of({**(start.config.model_dump() if start.config is not None else {}), **own})
        try:
            train(model, start.encoder, self._old, config, start.folder / "previous")
            found = {
                name: Factors(layer.A.detach().clone(), layer.B.detach().clone())
                for name, layer in adapted_layers(model).items()
            }
        finally:
            if info is not None:
                model.kore_info = info
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in before:
                        parameter.copy_(before[name])
        return found
