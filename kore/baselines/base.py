"""What a method is: how it makes a model trainable, on which data, and what it adds to the loss."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from kore.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from kore.covariance import CovarianceSet
    from kore.data import Conversation, Encoder
    from kore.penalty import Penalty


class Options(BaseModel):
    """A method's own hyper-parameters; none by default."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Preparation:
    """The arguments of :func:`kore.baselines.prepare_model` but model and method; see there."""

    cov: CovarianceSet | None = None
    rank: int | str | None = None
    targets: str | Sequence[str] | None = None
    modules_to_save: str | Sequence[str] | None = "auto"
    seed: int = 0
    scale: str = "sqrt"
    solver: str = "auto"
    train_a: bool = False
    strength: float = 1.0
    lora_alpha: int | None = None
    progress: bool = True
    checkpoint: str | os.PathLike[str] | None = None


class Baseline:
    """One method, with its options. The defaults are plain training on the new data.

    In order: :meth:`prepare` the model, choose the :meth:`conversations`, and give both and the :meth:`penalty` to
    :func:`kore.train`::

        method = kore.baselines.baseline("replay", share=0.1)
        model = method.prepare(model, Preparation(rank=128))
        data, penalty = method.conversations(new, old), method.penalty(model, encoder, old)
        kore.train(model, encoder, data, config, "out", penalty=penalty)

    Attributes:
        method: Its name.
        title: Its name in reports.
        source: Where it is from.
        reads_covariance: Whether :meth:`prepare` needs the covariance of old inputs.
        penalty_reads_covariance: Whether :meth:`penalty` needs it.
        reads_old: Whether :meth:`conversations` or :meth:`penalty` need old conversations with answers.
        in_full: Whether the model itself is trained, without an adapter.
        trains_a: Whether A of the adapter is trained, so that rank match-lora-R is R.
        options: Its hyper-parameters.
    """

    method: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    reads_covariance: bool = False
    penalty_reads_covariance: bool = False
    reads_old: bool = False
    in_full: ClassVar[bool] = False
    trains_a: ClassVar[bool] = True
    Options: ClassVar[type[Options]] = Options

    def __init__(self, **options: Any) -> None:
        try:
            self.options: Any = self.Options(**options)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            if first["type"] == "extra_forbidden":
                known = ", ".join(self.Options.model_fields) or "none"
                raise ConfigError(f"options.{name}: no such option of method {self.method}; it has {known}") from None
            raise ConfigError(f"options.{name}: {first['msg'].lower()}, got {first['input']!r}") from None

    def prepare(self, model: nn.Module, how: Preparation) -> nn.Module:
        """Make the model trainable, and say in its ``kore_info`` how.

        Raises:
            ConfigError: An argument is missing or not for this method.
            ModelError: The model carries an adapter already.
        """
        raise NotImplementedError

    def conversations(
        self, new: Sequence[Conversation], old: Sequence[Conversation] = (), seed: int = 0
    ) -> list[Conversation]:
        """What is trained on.

        Raises:
            ConfigError: The method needs old conversations and there are none.
        """
        self.check_old(old)
        return list(new)

    def penalty(
        self,
        model: nn.Module,
        encoder: Encoder,
        old: Sequence[Conversation] = (),
        cov: CovarianceSet | None = None,
    ) -> Penalty | None:
        """What is added to the loss, for the prepared model.

        Raises:
            ConfigError: The method needs old conversations, or the covariance of old inputs, and there are none.
        """
        self.check_old(old)
        return None

    def check_old(self, old: Sequence[Conversation]) -> None:
        """Raise ConfigError where old conversations are needed and missing."""
        if self.reads_old and not old:
            raise ConfigError(
                f"old: method {self.method} needs old conversations with answers; add old.files (kore train: --old)"
            )

    def describe(self) -> Mapping[str, Any]:
        """The options as ``kore.json`` holds them; nothing where the method has none."""
        values: dict[str, Any] = self.options.model_dump(mode="json")
        return {"options": values} if values else {}
