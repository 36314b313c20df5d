"""Capture the input covariances of a model's linear layers on old data."""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kore.capture.accumulator import Accumulator, rows, scale_samples
from kore.capture.checkpoint import CaptureCheckpoint
from kore.capture.input_groups import InputGroups
from kore.covariance import CovarianceSet
from kore.errors import KoreError
from kore.models import base_model, language_model_linears, model_fingerprint, named_linears, resolve_targets

NORMALIZE = ("none", "official")


def capture_covariance(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    targets: str | Sequence[str] | None = None,
    normalize: str = "none",
    progress: bool = True,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 16,
    dtype: torch.dtype = torch.float32,
    share_inputs: bool = True,
    buffer_rows: int = 2048,
) -> CovarianceSet:
    """C = Σ xᵀx over the inputs x (tokens, d_in) of every target layer (arXiv 2510.19316).

    Layers that read the same tensor share one matrix. Padding, that is rows of the language model where the
    batch's ``attention_mask`` (batch, tokens) is 0, does not count; in vision modules every row counts. The
    model runs in evaluation mode without gradients; its training flags are put back, its weights are untouched,
    and no hooks are left on it, also after an error. Nothing in the hooks waits for the device.

    Args:
        model: A transformers model, with or without adapters.
        batches: Keyword dictionaries for ``model(**batch)``; ``labels`` are dropped, tensors are moved to the
            model's device.
        targets: None for every linear layer of the language model except the output head; a regular expression
            that matches whole module names; or a list of PEFT-style names.
        normalize: ``"none"``, or ``"official"`` for x / |max(x)| per sample as in the official code (there also
            divided by 256 in the end, which changes no eigenvector and is left out).
        progress: Show a progress bar on an interactive terminal.
        checkpoint: A directory in which the run is saved every ``checkpoint_every`` batches and at its end. The
            same call with the same batches continues from there, and gives bit for bit the result of a call
            with this ``checkpoint_every`` that was never stopped. Delete it when the result is saved.
        dtype: Of C: float32, or float64 for twice the memory and small eigenvalues that can be trusted.
        share_inputs: False keeps one matrix per layer. Needed for a model in which layers that once read the
            same input do not always do.
        buffer_rows: Rows collected per matrix before it is updated.

    Returns:
        The covariances, on the devices of the layers, with the token counts and the model's fingerprint.

    Raises:
        KoreError: A target never ran, an input is not finite (the first such module is named), the batches are
            empty or malformed, or the checkpoint belongs to another call.
    """
    if normalize not in NORMALIZE:
        raise KoreError(f"normalize: expected one of {', '.join(NORMALIZE)}, got {normalize!r}")
    if dtype not in (torch.float32, torch.float64):
        raise KoreError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    if buffer_rows < 1 or checkpoint_every < 1:
        raise KoreError("buffer_rows and checkpoint_every: expected at least 1")
    linears, names = named_linears(model), resolve_targets(model, targets)
    head = _output_head(model)
    text = set(language_model_linears(model)) | {name for name in names if linears[name] is head}
    groups = InputGroups(text, lambda dim: Accumulator(dim, dtype, buffer_rows), share_inputs)
    fingerprint = model_fingerprint(model)
    run = _Run(model, {name: linears[name] for name in names}, text, groups, normalize)
    saved = None
    if checkpoint is not None:
        options = {
            "modules": names,
            "normalize": normalize,
            "dtype": str(dtype),
            "share_inputs": share_inputs,
            "buffer_rows": buffer_rows,
            "checkpoint_every": checkpoint_every,
            "fingerprint": fingerprint,
        }
        saved = CaptureCheckpoint(Path(checkpoint), options, groups)
    with run.hooked():
        _feed(run, batches, saved, checkpoint_every, progress)
    if run.done == 0:
        raise KoreError("capture_covariance: expected at least one batch, got none")
    if idle := groups.never_ran(names):
        raise KoreError(
            f"{idle[0]}: the model never ran this module on the given data ({len(idle)} such modules); "
            "leave it out of targets or give data that uses it"
        )
    matrices = {group.modules[0]: _symmetric(group.accumulator) for group in groups.groups}
    return CovarianceSet(matrices, [group.describe() for group in groups.groups], fingerprint, normalize)


def _feed(
    run: _Run,
    batches: Iterable[Mapping[str, Any]],
    saved: CaptureCheckpoint | None,
    checkpoint_every: int,
    progress: bool,
) -> None:
    from tqdm import tqdm

    total = len(batches) if isinstance(batches, Sized) else None
    iterator = iter(batches)
    if saved is not None:
        run.done = saved.resume(iterator)
    unsaved = 0
    with tqdm(
        total=total, initial=run.done, desc="covariance", unit="batch", disable=None if progress else True
    ) as bar:
        for batch in iterator:
            run.forward(batch)
            unsaved += 1
            bar.update()
            if saved is not None:
                saved.see(batch)
                if run.done % checkpoint_every == 0:
                    run.check_finite()
                    saved.write(run.done)
                    unsaved = 0
    run.check_finite()
    if saved is not None and unsaved:
        saved.write(run.done)


def _symmetric(accumulator: Accumulator) -> torch.Tensor:
    from kore_kernels import symmetrize_

    assert accumulator.matrix is not None
    symmetrize_(accumulator.matrix)
    return accumulator.matrix


def _output_head(model: nn.Module) -> nn.Module | None:
    base = base_model(model)
    return base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None


class _Run:
    """A model with hooks on its target layers, fed batch by batch."""

    def __init__(
        self,
        model: nn.Module,
        targets: dict[str, nn.Module],
        text: set[str],
        groups: InputGroups,
        normalize: str,
    ) -> None:
        self.model, self.targets, self.groups, self.normalize = model, targets, groups, normalize
        self._text = text
        self.done = 0
        self._shape: tuple[int, int] | None = None
        self._mask: torch.Tensor | None = None
        self._device = next(model.parameters()).device
        parameters = inspect.signature(base_model(model).forward).parameters
        self._extra: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
        if "logits_to_keep" in parameters and _output_head(model) not in targets.values():
            self._extra["logits_to_keep"] = 1

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Evaluation mode and hooks on the targets for the length of a block."""
        training = [(module, module.training) for module in self.model.modules()]
        handles = []
        try:
            self.model.eval()
            for name, module in self.targets.items():
                handles.append(module.register_forward_pre_hook(self._hook(name), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, flag in training:
                module.training = flag

    def forward(self, batch: Mapping[str, Any]) -> None:
        """One forward pass, accumulating every target's input."""
        if not isinstance(batch, Mapping):
            raise KoreError(f"batch {self.done}: expected a dictionary for model(**batch), got {type(batch).__name__}")
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        self._shape, self._mask = self._read_mask(inputs)
        with torch.no_grad():
            self.model(**{**self._extra, **{key: _to(value, self._device) for key, value in inputs.items()}})
        self.groups.end_pass()
        self.done += 1

    def _read_mask(self, inputs: dict[str, Any]) -> tuple[tuple[int, int] | None, torch.Tensor | None]:
        mask, ids = inputs.get("attention_mask"), inputs.get("input_ids", inputs.get("inputs_embeds"))
        if mask is None:
            if isinstance(ids, torch.Tensor) and ids.dim() > 1:
                return (ids.shape[0], ids.shape[1]), None
            return None, None
        if mask.dim() != 2:
            raise KoreError(f"batch {self.done}: expected an attention_mask (batch, tokens), got {tuple(mask.shape)}")
        full = mask.device.type == "cpu" and bool((mask != 0).all())
        return (mask.shape[0], mask.shape[1]), (None if full else (mask != 0).to(self._device))

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(value for value in itertools.chain(args, kwargs.values()) if isinstance(value, torch.Tensor))
            accumulator = self.groups.observe(name, x)
            if accumulator is None:
                return
            mask, shape = (self._mask, self._shape) if name in self._text else (None, None)
            flat, mask = rows(x, None if mask is None else mask.to(x.device), name)
            if self.normalize == "official":
                flat = scale_samples(flat, mask, _samples(x, shape))
            accumulator.add(flat, mask)

        return pre_hook

    def check_finite(self) -> None:
        """Empty the token buffers and name the first module, in the order of execution, whose C is not finite."""
        for group in self.groups.groups:
            group.accumulator.flush()
        for group in self.groups.groups:
            if not group.accumulator.is_finite():
                raise KoreError(
                    f"{group.modules[0]}: its input holds NaN or infinity on this data, and it is the first such "
                    "module; check the model's weights and dtype (try bfloat16 or float32)"
                )


def _samples(x: torch.Tensor, shape: tuple[int, int] | None) -> int:
    if shape is not None and x.numel() == shape[0] * shape[1] * x.shape[-1]:
        return shape[0]
    return x.shape[0] if x.dim() > 2 else 1


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to(item, device) for item in value)
    return value
