"""The rank of an adapter, given as a number or as a parameter budget."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from kore.errors import ConfigError
from kore.models import linear_shape, named_linears

_MATCH = "match-lora-"


def match_lora_rank(shapes: Iterable[tuple[int, int]], lora_rank: int) -> int:
    """The largest r with r Σ d_out ≤ R Σ (d_in + d_out) over layer shapes (d_out, d_in).

    B of rank r then has no more parameters than A and B of a LoRA of rank R; what else is trained, such as the
    projector, is the same on both sides. LLaVA-1.5 7B and 13B at R = 128 give the paper's 235. Qwen2.5-VL-7B
    gives 232; the paper's 274 for it is not this budget, and is to be given as a number.
    """
    shapes = list(shapes)
    d_out = sum(shape[0] for shape in shapes)
    return lora_rank * (d_out + sum(shape[1] for shape in shapes)) // d_out


def resolve_rank(model: nn.Module, names: Iterable[str], rank: int | str) -> int:
    """r for the layers ``names``, from a number or ``"match-lora-R"``.

    Raises:
        ConfigError: r is larger than d_in of one of the layers, which is named.
    """
    linears = named_linears(model)
    shapes = {name: linear_shape(linears[name]) for name in names}
    r = match_lora_rank(shapes.values(), int(rank.removeprefix(_MATCH))) if isinstance(rank, str) else rank
    narrow = min(shapes, key=lambda name: shapes[name][1])
    if r > shapes[narrow][1]:
        given = f" (from {rank!r})" if isinstance(rank, str) else ""
        raise ConfigError(
            f"rank: {r}{given} is larger than d_in = {shapes[narrow][1]} of {narrow}; "
            "take a smaller rank or leave the module out of targets"
        )
    return r
