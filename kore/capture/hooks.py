"""A model with hooks on its target layers, fed batch by batch."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from kore.capture.input_groups import InputGroups
from kore.capture.rows import counted_rows
from kore.capture.selection import Selection, Selector, send
from kore.errors import KoreError
from kore.models import base_model

_EVERY_ROW = Selection()
Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]


class HookedModel:
    """Runs a model on batches and hands every distinct input of its target layers to a group's accumulator.

    Args:
        model: The model.
        targets: The target layers by name.
        text: Names of the layers whose input rows are the batch's tokens. In others every row counts.
        selector: Says which tokens count.
        scale: Scale each sample as the official code does.
    """

    def __init__(
        self, model: nn.Module, targets: Mapping[str, nn.Module], text: set[str], selector: Selector, scale: bool
    ) -> None:
        self.model, self.targets, self.text, self.selector, self.scale = model, dict(targets), text, selector, scale
        self.device = input_device(model)
        self._selection = _EVERY_ROW
        parameters = inspect.signature(base_model(model).forward).parameters
        self._extra: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
        if "logits_to_keep" in parameters and output_head(model) not in self.targets.values():
            self._extra["logits_to_keep"] = 1

    @contextmanager
    def hooked(self, groups: InputGroups, accumulate: bool = True) -> Iterator[None]:
        """Evaluation mode and hooks on the targets for the length of a block; only finds the groups if asked to."""
        training = [(module, module.training) for module in self.model.modules()]
        handles = []
        try:
            self.model.eval()
            for name, module in self.targets.items():
                handles.append(self._attach(name, module, groups, accumulate))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, flag in training:
                module.training = flag

    def forward(self, batch: Mapping[str, Any], number: int) -> None:
        """Run one batch; ``number`` is the batch's, for messages."""
        if not isinstance(batch, Mapping):
            raise KoreError(f"batch {number}: expected a dictionary for model(**batch), got {type(batch).__name__}")
        self._selection = self.selector.select(batch, number)
        inputs = {key: _to(value, self.device) for key, value in batch.items() if key != "labels"}
        self._pass(batch, inputs, number)

    def _pass(self, batch: Mapping[str, Any], inputs: dict[str, Any], number: int) -> None:
        with torch.no_grad():
            self.model(**{**self._extra, **inputs})

    def _attach(self, name: str, module: nn.Module, groups: InputGroups, accumulate: bool) -> RemovableHandle:
        hook = self._hook(name, groups) if accumulate else _look(name, groups)
        return module.register_forward_pre_hook(hook, with_kwargs=True)

    def _hook(self, name: str, groups: InputGroups) -> Hook:
        text = name in self.text

        def pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _input(args, kwargs)
            accumulator = groups.observe(name, x)
            if accumulator is not None:
                selection = self._selection if text else _EVERY_ROW
                for rows in counted_rows(x, selection, name, self.scale, by_sample=not accumulator.visits):
                    accumulator.add(rows)

        return pre_hook


def _look(name: str, groups: InputGroups) -> Hook:
    def pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        groups.observe(name, _input(args, kwargs))

    return pre_hook


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    if args and isinstance(args[0], torch.Tensor):
        return args[0]
    return next(value for value in itertools.chain(args, kwargs.values()) if isinstance(value, torch.Tensor))


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes the logits, where the model names one."""
    base = base_model(model)
    return base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None


def input_device(model: nn.Module) -> torch.device:
    """Where a model takes its inputs; one that ``device_map`` has spread out, where its first computing part is."""
    placed = getattr(base_model(model), "hf_device_map", None)
    if placed:
        return torch.device(next((where for where in placed.values() if where not in ("cpu", "disk")), "cpu"))
    return next(model.parameters()).device


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return send(value, device)
    if isinstance(value, Mapping):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to(item, device) for item in value)
    return value
