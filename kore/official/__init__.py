"""Working with the official KORE code (KORE-LMM/KORE): its linear layer, and its checkpoints both ways.

``linear`` is the layer, ``to_adapter`` and ``to_official`` convert; they rest on ``factors`` (the algebra), ``names``
(which weight is which), ``checkpoint`` (tensors one at a time) and ``base`` (a model that stays in its files).
"""

from kore.official.linear import CovSVDLinear

__all__ = ["CovSVDLinear"]
