"""What a layer that can run fused is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn


class Fused:
    """Base of every fused class: a subclass of the class it stands in for, with the same parameters and state dict.

    :func:`kore.accelerate` sets the ``__class__`` of a layer to it and :func:`kore.decelerate` sets it back to
    ``plain``, so neither touches what the layer holds. What the fused form needs beside that is kept in attributes
    whose names begin with ``_fused_``; ``decelerate`` deletes them.
    """

    plain: ClassVar[Any]


@dataclass(frozen=True)
class Kind:
    """One sort of layer that can run fused.

    Attributes:
        matches: Whether a module, in its ordinary class, is of this sort.
        fused: The class that stands in for the class of such a module, a subclass of it and of :class:`Fused`.
        refusal: Why such a module in its present state cannot run fused, or None.
        modes: The modes of :func:`kore.accelerate` it has.
    """

    matches: Callable[[nn.Module], bool]
    fused: Callable[..., type]
    refusal: Callable[[Any], str | None]
    modes: tuple[str, ...] = ("exact",)

    @classmethod
    def of(cls, fused: type[Fused], refusal: Callable[[Any], str | None], modes: tuple[str, ...] = ("exact",)) -> Kind:
        """The sort of exactly the class that ``fused`` stands in for."""
        return cls(lambda module: type(module) is fused.plain, lambda _: fused, refusal, modes)
