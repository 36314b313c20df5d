"""Capture the input covariances of a model's linear layers on old data."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kore.capture.engine import Engine, Options
from kore.capture.gradients import GradientEngine
from kore.capture.plan import MemoryPlan
from kore.capture.storage import STORAGE
from kore.capture.windows import capture_in_windows, first_batch
from kore.covariance import CovarianceSet, OutputGradients
from kore.distributed import Processes
from kore.errors import KoreError
from kore.sizes import parse_bytes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def capture_covariance(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    targets: str | Sequence[str] | None = None,
    normalize: str = "none",
    progress: bool = True,
    *,
    tokens: str = "all",
    memory_budget: int | str | None = None,
    storage: str = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 16,
    dtype: torch.dtype = torch.float32,
    share_inputs: bool = True,
    buffer_rows: int = 2048,
    distributed: ProcessGroup | bool | None = None,
) -> CovarianceSet:
    """C = Σ xᵀx over the inputs x (tokens, d_in) of every target layer (arXiv 2510.19316).

    Layers that read the same tensor share one matrix. Padding, that is rows of the language model where the
    batch's ``attention_mask`` (batch, tokens) is 0, does not count; in vision modules every row counts. The
    model runs in evaluation mode without gradients; its training flags are put back, its weights are untouched,
    and no hooks are left on it, also after an error. Nothing in the hooks waits for the device.

    The memory that this takes is computed from the layer inputs of the first batch and shown before any matrix is
    made (see :func:`plan_capture`). A ``memory_budget`` costs one more forward pass, of the first batch.

    Args:
        model: A transformers model, with or without adapters, quantised, or spread out by ``device_map``.
        batches: Keyword dictionaries for ``model(**batch)``; ``labels`` are kept from the model, tensors are moved
            to its device.
        targets: None for every linear layer of the language model except the output head; a regular expression
            that matches whole module names; or a list of PEFT-style names.
        normalize: ``"none"``, or ``"official"`` for x / |max(x)| per sample as in the official code (there also
            divided by 256 in the end, which changes no eigenvector and is left out).
        progress: Show the memory plan, and a progress bar on an interactive terminal, on standard error.
        tokens: Which rows of the language model count: ``"all"``; ``"prompt"``, whose ``labels`` are -100, or
            ``"answer"``, the others; ``"image"``, at the model's image and video placeholders, or ``"text"``, the
            others. Modules outside the language model know no tokens: they can only be captured with ``"all"``.
        memory_budget: Bytes, or text like ``"12GiB"``, for matrices and token buffers on each device that sums
            rows (on the host for a model that runs there). What exceeds it is captured in several passes over the
            data, each over some neighbouring layers, with the finished ones on disk; or, when ``batches`` can be
            iterated only once, with the matrices of GPUs on the host.
        storage: ``"packed"`` keeps two matrices in the memory of one and costs nothing; ``"square"`` keeps each by
            itself, so that reading the result makes no copy; ``"offload"`` keeps pairs on the host and moves one to
            the device and back for each flush (raise ``buffer_rows``); ``"auto"`` is packed, as far as the budget
            allows.
        checkpoint: A directory in which the run is saved every ``checkpoint_every`` batches and at its end. The
            same call with the same batches continues from there, and gives bit for bit the result of a call
            with this ``checkpoint_every`` that was never stopped. Delete it when the result is saved: the result
            of several passes is read from there. Processes that capture together each have a folder in it.
        dtype: Of C: float32, or float64 for twice the memory and small eigenvalues that can be trusted.
        share_inputs: False keeps one matrix per layer. Needed for a model in which layers that once read the
            same input do not always do.
        buffer_rows: Rows collected per matrix before it is updated.
        distributed: Processes that each capture their own batches and all get the sum: None for those of
            ``torch.distributed`` where it is initialised, a process group, or False for this process alone.

    Returns:
        The covariances, on the devices of the layers (the host with offload, the disk after several passes), with
        the token counts and the model's fingerprint.

    Raises:
        KoreError: A target never ran, an input is not finite (the first such module is named), the batches are
            empty or malformed or lack what ``tokens`` needs, nothing fits into the budget, or the checkpoint
            belongs to another call.
    """
    options = Options(tokens, normalize, dtype, share_inputs, buffer_rows, checkpoint_every, progress)
    engine = Engine(model, targets, options, Processes(distributed))
    return _capture(engine, batches, storage, _budget(memory_budget, storage), checkpoint)


def capture_output_gradients(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    targets: str | Sequence[str] | None = None,
    progress: bool = True,
    *,
    tokens: str = "text",
    seed: int = 0,
    memory_budget: int | str | None = None,
    storage: str = "auto",
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 16,
    dtype: torch.dtype = torch.float32,
    buffer_rows: int = 2048,
    distributed: ProcessGroup | bool | None = None,
) -> OutputGradients:
    """G = Σ gᵀg (d_out, d_out) over the gradients g = ∂ℓ/∂y at the outputs y of every target layer.

    ℓ = −Σ log p(ŷ) over the predicted tokens, with labels ŷ drawn from the model's own p, so that G / tokens and
    C / tokens are the two Kronecker factors of the Fisher information of a layer's weight: ½ tr(ΔWᵀ G ΔW C) / tokens
    estimates the divergence KL(old ‖ new) on the data, in nats, that a small change ΔW makes. Every row counts that
    is not padding, also one that no loss reaches. The logits' gradient is softmax − onehot(ŷ); no parameter gets a
    gradient, and the flags, hooks and weights are put back as in :func:`capture_covariance`.

    The memory is planned as for C, with d_out for d_in and one matrix per layer; on top come the activations that a
    backward pass through a batch needs. Time is about that of a training step without weight gradients.

    Args:
        model, batches, targets, progress: As in :func:`capture_covariance`.
        tokens: At which predictions a loss is taken: ``"all"``; ``"text"``, of tokens that are no image or video
            placeholders; or ``"answer"``, of tokens that ``labels`` names. With the first two also of the token
            that would follow the last.
        seed: Of the labels. They also depend on the number of the batch and the process, and on nothing else.
        memory_budget, storage, checkpoint, checkpoint_every, dtype, buffer_rows, distributed: As in
            :func:`capture_covariance`.

    Raises:
        KoreError: As :func:`capture_covariance`.
    """
    options = Options("all", "none", dtype, False, buffer_rows, checkpoint_every, progress)
    engine = GradientEngine(model, targets, options, Processes(distributed), tokens, seed)
    result = _capture(engine, batches, storage, _budget(memory_budget, storage), checkpoint)
    assert isinstance(result, OutputGradients)
    return result


def _capture(
    engine: Engine,
    batches: Iterable[Mapping[str, Any]],
    storage: str,
    budget: int | None,
    checkpoint: str | os.PathLike[str] | None,
) -> CovarianceSet:
    folder = engine.checkpoint_folder(checkpoint)
    if budget is None:
        return engine.capture(batches, engine.names, storage, folder)
    again, first, batches = first_batch(batches)
    plan = engine.plan(first, storage, budget, again)
    engine.announce(plan)
    if len(plan.windows) > 1:
        return capture_in_windows(engine, plan, batches, folder)
    return engine.capture(batches, engine.names, plan.storage, folder, planned=True)


def plan_capture(
    model: nn.Module,
    batch: Mapping[str, Any],
    targets: str | Sequence[str] | None = None,
    normalize: str = "none",
    *,
    memory_budget: int | str | None = None,
    storage: str = "auto",
    dtype: torch.dtype = torch.float32,
    share_inputs: bool = True,
    buffer_rows: int = 2048,
) -> MemoryPlan:
    """The memory that :func:`capture_covariance` would take with these arguments, without capturing.

    Costs one forward pass of ``batch``, which should use every target: what it does not run is planned as if it
    shared no input. ``print`` shows the plan.

    Raises:
        KoreError: An argument is wrong, or nothing fits into the budget.
    """
    engine = Engine(model, targets, Options("all", normalize, dtype, share_inputs, buffer_rows), Processes(False))
    return engine.plan(batch, storage, _budget(memory_budget, storage), again=True)


def _budget(memory_budget: int | str | None, storage: str) -> int | None:
    if storage not in STORAGE:
        raise KoreError(f"storage: expected one of {', '.join(STORAGE)}, got {storage!r}")
    if memory_budget is None:
        return None
    try:
        return parse_bytes(memory_budget)
    except KoreError as error:
        raise KoreError(f"memory_budget: {error}") from None
