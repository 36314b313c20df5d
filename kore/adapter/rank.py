"""The rank of an adapter: a number, a parameter budget, or a share of the old inputs' energy."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from kore.errors import ConfigError
from kore.models import linear_shape, named_linears

_MATCH, _ENERGY = "match-lora-", "energy:"
RANKS = (
    'a positive integer, "match-lora-R" such as "match-lora-128", or "energy:τ" with 0 < τ < 1 such as "energy:0.001"'
)


def is_rank(rank: object) -> bool:
    """Whether ``rank`` is one of :data:`RANKS`."""
    if isinstance(rank, str):
        return re.fullmatch(rf"{_MATCH}[1-9]\d*", rank) is not None or energy_share(rank) is not None
    return isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1


def energy_share(rank: int | str) -> float | None:
    """τ of ``"energy:τ"``; None for another kind of rank."""
    if not isinstance(rank, str) or not rank.startswith(_ENERGY):
        return None
    try:
        share = float(rank.removeprefix(_ENERGY))
    except ValueError:
        return None
    return share if 0 < share < 1 else None


def match_lora_rank(shapes: Iterable[tuple[int, int]], lora_rank: int) -> int:
    """The largest r with r Σ d_out ≤ R Σ (d_in + d_out) over layer shapes (d_out, d_in).

    B of rank r then has no more parameters than A and B of a LoRA of rank R; what else is trained, such as the
    projector, is the same on both sides. LLaVA-1.5 7B and 13B at R = 128 give the paper's 235. Qwen2.5-VL-7B
    gives 232; the paper's 274 for it is not this budget, and is to be given as a number.
    """
    shapes = list(shapes)
    d_out = sum(shape[0] for shape in shapes)
    return lora_rank * (d_out + sum(shape[1] for shape in shapes)) // d_out


def resolve_rank(model: nn.Module, names: Iterable[str], rank: int | str, train_a: bool = False) -> int:
    """r for the layers ``names``, from a number or ``"match-lora-R"``, which is R itself where A is trained too.

    Raises:
        ConfigError: r is larger than d_in of one of the layers, which is named; or it is ``"energy:τ"``, which needs
            a covariance.
    """
    if energy_share(rank) is not None:
        raise ConfigError(f"rank: {rank!r} needs a covariance, so method kore; give a number or match-lora-R")
    linears = named_linears(model)
    shapes = {name: linear_shape(linears[name]) for name in names}
    if isinstance(rank, str):
        budget = int(rank.removeprefix(_MATCH))
        r = budget if train_a else match_lora_rank(shapes.values(), budget)
    else:
        r = rank
    narrow = min(shapes, key=lambda name: shapes[name][1])
    if r > shapes[narrow][1]:
        given = f" (from {rank!r})" if isinstance(rank, str) else ""
        raise ConfigError(
            f"rank: {r}{given} is larger than d_in = {shapes[narrow][1]} of {narrow}; "
            "take a smaller rank or leave the module out of targets"
        )
    return r
