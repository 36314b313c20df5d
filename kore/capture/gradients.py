"""Gradients of the model's own loss at the outputs of its layers, summed like inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from kore.capture.engine import Engine, Options
from kore.capture.hooks import HookedModel
from kore.capture.input_groups import InputGroups
from kore.capture.rows import counted_rows
from kore.capture.selection import Selection, Selector
from kore.covariance import CovarianceSet, Group, OutputGradients
from kore.distributed import Processes
from kore.errors import KoreError
from kore.models import linear_shape

PREDICTED = ("all", "text", "answer")
_EVERY_ROW = Selection()


class GradientEngine(Engine):
    """Captures G = Σ gᵀg of one model; see :func:`kore.capture.capture_output_gradients`.

    Args:
        predicted: At which tokens a loss is taken.
        seed: Of the labels.
    """

    result_type = OutputGradients
    rows = "output gradient"

    def __init__(
        self,
        model: nn.Module,
        targets: str | Sequence[str] | None,
        options: Options,
        processes: Processes,
        predicted: str,
        seed: int,
    ) -> None:
        if predicted not in PREDICTED:
            raise KoreError(f"tokens: expected one of {', '.join(PREDICTED)}, got {predicted!r}")
        super().__init__(model, targets, options, processes)
        self._predicted, self._seed = predicted, seed

    def _hooked(self, names: Sequence[str]) -> HookedModel:
        targets = {name: self._linears[name] for name in names}
        seed = f"{self._seed} {self.processes.rank}"
        return GradientModel(self.model, targets, self._text, self._selector, self._predicted, seed)

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "tokens": self._predicted, "seed": self._seed}

    def _dim(self, name: str) -> int:
        return linear_shape(self._linears[name])[0]

    def _result(self, groups: InputGroups, described: list[Group]) -> CovarianceSet:
        result = super()._result(groups, described)
        result.selection = self._predicted
        return result


class GradientModel(HookedModel):
    """Runs a model forwards and backwards and hands the gradient at every target's output to its accumulator.

    The loss is −Σ log p(ŷ) with labels ŷ drawn from the model's own p, one for each predicted token. No parameter
    gets a gradient: the graph begins at the outputs of the first targets.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, nn.Module],
        text: set[str],
        selector: Selector,
        predicted: str,
        seed: str,
    ) -> None:
        super().__init__(model, targets, text, selector, scale=False)
        self._predicted, self._seed = predicted, seed
        self._predicts = Selector(predicted, model)

    @contextmanager
    def hooked(self, groups: InputGroups, accumulate: bool = True) -> Iterator[None]:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            with super().hooked(groups, accumulate):
                yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def _attach(self, name: str, module: nn.Module, groups: InputGroups, accumulate: bool) -> RemovableHandle:
        text = name in self.text

        def observe(g: torch.Tensor) -> None:
            accumulator = groups.observe(name, g)
            if accumulator is not None and accumulate:
                (rows,) = counted_rows(g.detach(), self._selection if text else _EVERY_ROW, name)
                accumulator.add(rows)

        def hook(module: nn.Module, args: tuple[Any, ...], y: torch.Tensor) -> None:
            if torch.is_grad_enabled():
                (y if y.requires_grad else y.requires_grad_()).register_hook(observe)

        return module.register_forward_hook(hook)

    def _pass(self, batch: Mapping[str, Any], inputs: dict[str, Any], number: int) -> None:
        losses = self._losses(batch, number)
        extra = dict(self._extra)
        if "logits_to_keep" in extra:
            places = losses.any(dim=0).nonzero().squeeze(1)
            extra["logits_to_keep"] = places.to(self.device)
            losses = losses[:, places]
        with torch.enable_grad():
            logits = self.model(**{**extra, **inputs}).logits
        if not logits.requires_grad:
            raise KoreError(f"batch {number}: no target lies between the model's inputs and its logits")
        generator = torch.Generator().manual_seed(_number(f"{self._seed} {number}"))
        gradient = torch.zeros_like(logits)
        for row, of_row, mask in zip(logits.detach(), gradient, losses.to(logits.device)):
            of_row[mask] = loss_gradient(row[mask], generator).to(gradient.dtype)
        logits.backward(gradient)

    def _losses(self, batch: Mapping[str, Any], number: int) -> torch.Tensor:
        """(batch, tokens) bool on the CPU: the positions from which a token is predicted that counts.

        What follows a sample's last token counts, unless only answers do.
        """
        ids, mask = batch.get("input_ids", batch.get("inputs_embeds")), batch.get("attention_mask")
        if not isinstance(ids, torch.Tensor):
            raise KoreError(f"batch {number}: expected input_ids or inputs_embeds")
        kind = self._predicts.select({key: batch[key] for key in batch if key != "attention_mask"}, number).keep
        losses = torch.ones(ids.shape[:2], dtype=torch.bool)
        losses[:, -1] = self._predicted != "answer"
        if kind is not None:
            losses[:, :-1] = kind[:, 1:].cpu()
        return losses if mask is None else losses & (mask != 0).cpu()


def loss_gradient(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """softmax(logits) − onehot(ŷ) with ŷ drawn from softmax(logits): the gradient of −Σ log p(ŷ), at least float32.

    ``logits`` (rows, vocabulary); ``generator`` as in :func:`draw_labels`.
    """
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    labels = draw_labels(p, generator)
    return p.scatter_add_(-1, labels, p.new_full(labels.shape, -1.0))


def draw_labels(p: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One label (rows, 1) for each of the distributions ``p`` (rows, vocabulary).

    ``generator`` is the CPU's, so that all devices draw alike up to rounding.
    """
    drawn = torch.rand(len(p), 1, generator=generator, dtype=torch.float64).to(p)
    cumulated = p.cumsum(-1)
    return torch.searchsorted(cumulated, drawn * cumulated[:, -1:], right=True).clamp_(max=p.shape[-1] - 1)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
