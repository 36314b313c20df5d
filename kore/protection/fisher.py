"""The diagonal of the Fisher information, streamed example by example."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kore.artifacts import MANIFEST, atomic_directory, load_tensors, read_manifest, save_tensors, write_manifest
from kore.capture.gradients import draw_labels
from kore.distributed import Processes
from kore.errors import KoreError
from kore.processes import is_main_process

if TYPE_CHECKING:
    from kore.data import Encoder
    from kore.training.dataset import TrainingSet

_log = logging.getLogger(__name__)

LABELS = ("model", "data")
_FILE = "fisher.safetensors"


def diagonal_fisher(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    encoder: Encoder,
    examples: TrainingSet,
    labels: str = "model",
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """F_i = (1/T) Σ_x (∂ Σ_t −log p(ŷ_t | x, t) / ∂θ_i)², over the examples x and their T answer tokens t.

    The gradient of one example is squared, never that of a batch: the square of a mean is up to a batch too small.
    With labels ŷ drawn from p itself the expectation is the Fisher information per token, for gradients of separately
    drawn tokens are uncorrelated: ½ Σ F_i δ_i² is to second order the mean KL(old ‖ new) of an answer token in nats
    after a change δ, without the terms off the diagonal. With the labels of the data it is the "empirical" one.

    In ``torch.distributed`` every process takes its share of the examples, and all get the same sums. What example
    number n draws depends on ``seed`` and n alone. The model runs without dropout, in its own dtype; its flags, modes
    and the random state come back as they were, and gradients are dropped as soon as they are squared.

    Args:
        model: Whole, not sharded.
        parameters: θ, by any names; floating-point leaves of the model.
        encoder: Its encoder.
        examples: Old conversations.
        labels: ``"model"`` or ``"data"``.
        seed: Of the labels.

    Returns:
        F by the names of ``parameters``, of their shapes, on the CPU, in float32 (float64 for float64).

    Raises:
        KoreError: F is not finite.
    """
    processes, device = Processes(), next(model.parameters()).device
    sums = {
        name: torch.zeros_like(parameter, dtype=_dtype(parameter), requires_grad=False)
        for name, parameter in parameters.items()
    }
    tokens = 0
    with processes.fail_together("the Fisher information"), _only(model, parameters, sums):
        for number in range(processes.rank, len(examples), processes.count):
            batch = {key: value.to(device) for key, value in encoder.collate([examples[number]]).items()}
            tokens += _backward(model, batch, labels, f"{seed} {number}")
    tokens = sum(processes.share(tokens))
    for name in sums:
        sums[name] = (processes.total(sums[name]) / tokens).to(sums[name].dtype)
        if not torch.isfinite(sums[name]).all():
            raise KoreError(f"the Fisher information of {name} is not finite; look for broken old examples")
    if is_main_process():
        count = sum(value.numel() for value in sums.values())
        _log.info("Fisher information of %d numbers from %d examples, %d answer tokens", count, len(examples), tokens)
    return sums


def _backward(model: nn.Module, batch: dict[str, torch.Tensor], labels: str, seed: str) -> int:
    """Run one example forwards and backwards; the number of its answer tokens."""
    from kore.training.trainer import forward, selects_logits

    with torch.enable_grad():
        passed = forward(model, batch, selects_logits(model))
        logits = passed.logits[passed.labelled]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = passed.targets[passed.labelled]
        if labels == "model":
            generator = torch.Generator().manual_seed(int(hashlib.sha256(seed.encode()).hexdigest()[:15], 16))
            targets = draw_labels(logits.detach().softmax(-1), generator).squeeze(-1)
        torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    return len(targets)


@contextlib.contextmanager
def _only(model: nn.Module, parameters: Mapping[str, nn.Parameter], sums: dict[str, torch.Tensor]) -> Iterator[None]:
    """Gradients for these parameters alone, each squared into its sum and dropped when it is there."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = [module for module in model.modules() if module.training]
    handles = []

    def adder(total: torch.Tensor) -> Any:
        def add(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            total.add_(parameter.grad.to(total.dtype).square_())
            parameter.grad = None

        return add

    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            handles.append(parameter.register_post_accumulate_grad_hook(adder(sums[name])))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def save_fisher(values: Mapping[str, torch.Tensor], folder: Path, about: Mapping[str, Any]) -> None:
    """Write an artifact that appears whole or not at all; ``about`` goes into its manifest."""
    with atomic_directory(folder) as directory:
        save_tensors(dict(values), directory / _FILE)
        write_manifest(directory, "fisher", about)


def load_fisher(folder: Path) -> dict[str, torch.Tensor] | None:
    """What :func:`save_fisher` wrote, None where there is nothing. Raises ArtifactError where it is damaged."""
    if not (folder / MANIFEST).is_file():
        return None
    read_manifest(folder, "fisher")
    return load_tensors(folder / _FILE)


def _dtype(parameter: torch.Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)
