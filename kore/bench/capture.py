"""A whole pass over a model: what capturing covariances adds to a plain forward pass, beside the official hooks."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import kore
from kore.bench.check import InaccurateError
from kore.bench.machine import name_of
from kore.bench.official import SAMPLES, official_hooks
from kore.bench.timing import Clock, Step, in_turn, ratio
from kore.models import language_model_linears, named_linears

PLAIN, CAPTURE, CAPTURE_SCALED, OFFICIAL = "plain", "capture", "capture, official scaling", "official hooks"
Batches = Sequence[Mapping[str, Tensor]]

_EXACT_MODULES = 4
_TOLERANCE = 1e-5  # sums of the same inputs, in float32


def plain_pass(model: nn.Module, batches: Batches) -> None:
    """Forward passes as the capture makes them: no cache, the logits of the last token only, no gradients."""
    device = next(model.parameters()).device
    known = inspect.signature(model.forward).parameters
    extra = {name: value for name, value in (("use_cache", False), ("logits_to_keep", 1)) if name in known}
    with torch.no_grad():
        for batch in batches:
            model(**extra, **{key: value.to(device, non_blocking=True) for key, value in batch.items()})


def passes(
    model: nn.Module, batches: Batches, official: bool = True, official_dtype: torch.dtype | None = None
) -> dict[str, Step]:
    """The passes by name. A capture is one call of ``kore.capture_covariance``, its set-up and its end included."""
    steps: dict[str, Step] = {
        PLAIN: lambda: plain_pass(model, batches),
        CAPTURE: lambda: kore.capture_covariance(model, batches, progress=False),
        CAPTURE_SCALED: lambda: kore.capture_covariance(model, batches, normalize="official", progress=False),
    }
    if official:
        steps[OFFICIAL] = lambda: _official_pass(model, batches, official_dtype)
    return steps


def measure(
    model: nn.Module,
    batches: Batches,
    clock: Clock,
    rounds: int,
    seconds: float = float("inf"),
    official: bool = True,
    official_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Check the captures, then time whole passes in turn. "capture, official scaling" computes the official sums.

    Args:
        model: A Hugging Face model.
        batches: Of one sample each where the official hooks are to run.
        clock: Of the model's device.
        rounds: Of every kind of pass.
        seconds: No further round is begun after that, once there are three.
        official: Whether the official hooks run too.
        official_dtype: See :func:`kore.bench.official.official_hooks`.

    Raises:
        InaccurateError: A covariance is not that of the inputs; nothing was timed.
    """
    errors = {CAPTURE: error_of_capture(model, batches)}
    if official:
        errors[CAPTURE_SCALED] = difference_from_official(model, batches[:2])
    for name, error in errors.items():
        if not error <= _TOLERANCE:
            raise InaccurateError(f"{name}: relative error {error:.2e}, allowed are {_TOLERANCE:.0e}")
    steps = passes(model, batches, official, official_dtype)
    times = in_turn(steps, clock.wall_seconds, rounds, warm_up=1, seconds=seconds)
    result: dict[str, Any] = {
        "dtype": name_of(next(model.parameters()).dtype),
        "batches": len(batches),
        "tokens": sum(batch["input_ids"].numel() for batch in batches),
        "rounds": len(times[PLAIN]),
        "relative_error": errors,
        "median_s": {name: statistics.median(values) for name, values in times.items()},
        "over_plain": {name: ratio(times[name], times[PLAIN]) for name in steps if name != PLAIN},
    }
    if official:
        result["overhead_of_official"] = {name: _share(times, name) for name in (CAPTURE, CAPTURE_SCALED)}
    return result


def _share(times: Mapping[str, list[float]], name: str) -> dict[str, float]:
    """Time added by a capture over time added by the official hooks: of the medians, the best times, and each round."""
    plain, ours, official = times[PLAIN], times[name], times[OFFICIAL]
    shares = [(mine - bare) / (theirs - bare) for mine, theirs, bare in zip(ours, official, plain)]
    of_medians, of_best = (
        (pick(ours) - pick(plain)) / (pick(official) - pick(plain)) for pick in (statistics.median, min)
    )
    spread = {"median": statistics.median(shares), "least": min(shares), "most": max(shares)}
    return {"of_medians": of_medians, "of_best": of_best, **spread}


def _official_pass(model: nn.Module, batches: Batches, dtype: torch.dtype | None) -> dict[str, Tensor]:
    with official_hooks(model, dtype) as sums:
        plain_pass(model, batches)
        return dict(sums)


def error_of_capture(model: nn.Module, batches: Batches) -> float:
    """Largest ‖C − exact‖ / ‖exact‖ over a few modules, exact being summed in float64 by hooks of its own."""
    names = language_model_linears(model)[-_EXACT_MODULES:]
    exact: dict[str, Tensor | float] = dict.fromkeys(names, 0.0)

    def hook(name: str) -> Callable[..., None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            exact[name] += x.T @ x

        return add

    linears = named_linears(model)
    handles = [linears[name].register_forward_pre_hook(hook(name)) for name in names]
    try:
        plain_pass(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    captured = kore.capture_covariance(model, batches, progress=False)
    return max(_difference(captured[name], exact[name]) for name in names)


def difference_from_official(model: nn.Module, batches: Batches) -> float:
    """Largest relative difference between a capture with the official scaling and the official hooks, in float32."""
    captured = kore.capture_covariance(model, batches, normalize="official", progress=False)
    official = _official_pass(model, batches, torch.float32)
    return max(_difference(captured[name], SAMPLES * total) for name, total in official.items())


def _difference(found: Tensor, expected: Tensor | float) -> float:
    wanted = torch.as_tensor(expected, dtype=torch.float64, device=found.device)
    return float((found.double() - wanted).norm() / wanted.norm())
