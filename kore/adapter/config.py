"""What adapter to make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kore.adapter.rank import RANKS, energy_share, is_rank
from kore.errors import ConfigError

SCALES = ("sqrt", "orthonormal")
CONSTRAINTS = ("null_space", "none")
SOLVERS = ("auto", "eigh", "randomized", "svd")


@dataclass(frozen=True)
class KoreConfig:
    """A KORE adapter: W0 + BA with A (r, d_in) frozen in the null space of the old inputs, B (d_out, r) trained.

    The options are those of the paper and its neighbours, to be compared with each other.

    Attributes:
        rank: r, or ``"match-lora-R"`` for the largest r at which the trained B have no more parameters than a
            LoRA of rank R (its A and B) on the same layers: 235 for R = 128 on LLaVA-1.5-7B (with ``train_a`` it is
            R). ``"energy:τ"``: for each layer the largest r (from 1 to d_in) at which the leak tr(UᵀCU)/tr(C) on the
            captured data stays below τ.
        targets: The layers: None for every linear layer of the language model except the output head, a regular
            expression that matches whole module names, or a list of PEFT-style names.
        modules_to_save: Modules trained in full beside the adapter, by PEFT-style name; ``"auto"`` for the
            multimodal projector (nothing for a text-only model); None for nothing.
        scale: Row lengths of A. ``"sqrt"``: A = √Σ Vᵀ of svd(W0 U Uᵀ) as in the paper. ``"orthonormal"``: A = Vᵀ.
        constraint: ``"null_space"``; or ``"none"``, where a random subspace takes the place of the null space and
            all else stays the same (a random frozen A).
        solver: ``"auto"``, ``"eigh"``, ``"randomized"`` or ``"svd"``, see :func:`kore.null_space`. ``"energy:τ"``
            always takes whole spectra, by eigh.
        seed: Of the randomized solver, and of the random subspaces.
        train_a: Train A too, from the paper's start W0' + B0 A0 with W0' = W0 − B0 A0: PEFT then sees a LoRA of rank
            2r on the untouched W0, lora_A = [A; A0] and lora_B = [B, −B0] with constant A0 and B0, which begins with
            A = A0 and B = B0, an update of 0. What protects the old inputs is then only where training starts.
        strength: t in (0, 1], between no constraint and the null space: A spans U(t), the point at t of the geodesic
            (:func:`kore.nullspace.geodesic`) from the random subspace that ``constraint="none"`` has for the same
            seed and input to the null space. The old inputs' energy in U(t) falls with t; 1 is the null space.
    """

    rank: int | str
    targets: str | Sequence[str] | None = None
    modules_to_save: str | Sequence[str] | None = None
    scale: str = "sqrt"
    constraint: str = "null_space"
    solver: str = "auto"
    seed: int = 0
    train_a: bool = False
    strength: float = 1.0

    def __post_init__(self) -> None:
        for name, allowed in (("scale", SCALES), ("constraint", CONSTRAINTS), ("solver", SOLVERS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not is_rank(self.rank):
            raise ConfigError(f"rank: expected {RANKS}, got {self.rank!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise ConfigError(f"seed: expected an integer ≥ 0, got {self.seed!r}")
        if not isinstance(self.train_a, bool):
            raise ConfigError(f"train_a: expected true or false, got {self.train_a!r}")
        self._check_strength()

    def _check_strength(self) -> None:
        t = self.strength
        if not isinstance(t, int | float) or isinstance(t, bool) or not 0 < t <= 1:
            raise ConfigError(f'strength: expected a number above 0 and up to 1, got {t!r}; 0 is constraint="none"')
        if t < 1 and self.constraint == "none":
            raise ConfigError(f'strength: {t} lies between constraint="none" and the null space; give one or the other')
        if t < 1 and energy_share(self.rank) is not None:
            raise ConfigError(
                f"strength: at {t} A reads more of the old inputs' energy than rank {self.rank!r} allows; give the "
                "rank as a number or match-lora-R"
            )
