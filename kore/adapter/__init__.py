"""From a covariance to a trainable adapter: a stock PEFT LoRA whose A is set from the null space and frozen.

``config`` says what to make, ``rank`` and ``targets`` resolve it against a model, ``factors`` computes a matrix A,
``compute`` those of all layers, on one process or several, keeping what is finished in ``parts``; ``frozen`` keeps them
frozen, ``halves`` trains them beside a constant half, ``build`` puts the adapter on a model, ``files`` saves and loads
it.
"""

from kore.adapter.build import get_kore_model
from kore.adapter.config import KoreConfig
from kore.adapter.factors import thin_init
from kore.adapter.files import load_adapter, load_kore_model, save_adapter
from kore.adapter.frozen import FrozenLinear, freeze_a
from kore.adapter.halves import HalfFrozenLinear, freeze_halves
from kore.adapter.rank import match_lora_rank, resolve_rank

__all__ = [
    "FrozenLinear",
    "HalfFrozenLinear",
    "KoreConfig",
    "freeze_a",
    "freeze_halves",
    "get_kore_model",
    "load_adapter",
    "load_kore_model",
    "match_lora_rank",
    "resolve_rank",
    "save_adapter",
    "thin_init",
]
