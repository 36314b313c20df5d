"""What a method adds to the loss on the new answers, and when training asks for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kore.artifacts import atomic_write, read_json

if TYPE_CHECKING:
    import torch

    from kore.data import Encoder
    from kore.training.config import TrainConfig
    from kore.training.dataset import TrainingSet


PENALTY = "penalty"
"""The name of the folder for what a penalty keeps."""
IGNORE = -100
"""The label of a token without loss."""


@dataclass(frozen=True)
class Start:
    """What a penalty may ask of a run before its first step.

    Attributes:
        model: The prepared model, before it is wrapped.
        encoder: Its encoder.
        examples: The encoded training examples.
        batch_size: Examples of one forward pass.
        folder: A folder of the run for what the penalty keeps; it goes when the run is begun anew.
        untouched_loss: Gives the mean loss of the untouched model on the new answer tokens; call it in every process.
        seed: Of what the penalty draws at random.
        on_bad_row: What to do with old examples that cannot be encoded, "fail" or "skip".
        config: The settings of the run.
    """

    model: Any
    encoder: Encoder
    examples: TrainingSet
    batch_size: int
    folder: Path
    untouched_loss: Callable[[], float]
    seed: int = 0
    on_bad_row: str = "fail"
    config: TrainConfig | None = None

    def kept(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the JSON file ``name`` in the folder holds, the same in every process and in every resumed run.

        Where there is no such file yet, ``compute`` is called in every process and the first one writes its result.
        """
        import torch.distributed as dist

        together = dist.is_available() and dist.is_initialized()
        file = self.folder / name
        there = file.is_file()
        if together:
            dist.barrier()
        values = read_json(file) if there else compute()
        if not there and (not together or dist.get_rank() == 0):
            atomic_write(file, json.dumps(values, indent=1) + "\n")
        return dict(values)


@dataclass(frozen=True)
class Forward:
    """One forward pass of training.

    Attributes:
        inputs: The arguments the model was called with, without labels.
        outputs: What it returned.
        logits: (batch, positions, vocabulary), those that predict ``targets``.
        targets: (batch, positions), -100 where there is no loss.
        count: Labelled tokens of the whole optimizer step, over all its forward passes and processes.
    """

    inputs: Mapping[str, Any]
    outputs: Any
    logits: torch.Tensor
    targets: torch.Tensor
    count: torch.Tensor | int

    @property
    def labelled(self) -> torch.Tensor:
        """(batch, positions), True where there is loss."""
        return self.targets != IGNORE


class Penalty:
    """What is added to the mean loss over the new answer tokens of an optimizer step. This class adds nothing.

    A penalty may also look at each update of the weights, keep a state of its own, and have the last word on them.

    Attributes:
        reads_gradients: Whether it needs the gradient of every trained parameter whole, so no sharding of any sort.
    """

    reads_gradients = False

    def identity(self) -> dict[str, Any]:
        """What a run with it depends on, JSON-serialisable: another identity is another run."""
        raise NotImplementedError

    def begin(self, start: Start) -> None:
        """Called once before the first step, also of a resumed run, in every process."""

    def step(self) -> torch.Tensor | None:
        """A scalar that is added once for each optimizer step, in every process the same."""
        return None

    def batch(self, forward: Forward) -> torch.Tensor | None:
        """A scalar that is added for each forward pass; over those of a step they add up, so it is a sum over the
        labelled tokens divided by ``forward.count``."""
        return None

    def before_update(self) -> None:
        """Called before each update of the weights; their gradients, clipped, are in place."""

    def after_update(self) -> None:
        """Called after each update of the weights; the gradients are still those before it."""

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold for :meth:`load_state`; asked for in the first process."""
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a checkpoint; called after :meth:`begin`, in every process."""

    def finish(self) -> None:
        """Called after the last step, before the weights are saved as the result; may change them."""

    def log(self) -> dict[str, float]:
        """Further numbers for the history, as of the last step."""
        return {}
