"""The model and encoder that the stages of one run share; at most one model is in memory."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

from kore.errors import ArtifactError
from kore.pipeline.config import DataSection, ModelSection

if TYPE_CHECKING:
    import torch

    from kore.data import Conversations, Encoder
    from kore.evaluation import ProcessorPrompts


class Workbench:
    """Loads a model when a stage asks for it and hands the same one to the next stage that wants it as it is.

    Args:
        model: Which model, in which dtype, where.
        progress: Whether stages show progress bars.
    """

    def __init__(self, model: ModelSection, progress: bool = True) -> None:
        self.section = model
        self.progress = progress
        self._model: torch.nn.Module | None = None
        self._holds: tuple[str, ...] = ()
        self._encoder: Encoder | None = None
        self._read: dict[str, Conversations] = {}

    @property
    def encoder(self) -> Encoder:
        """The encoder of the base model."""
        if self._encoder is None:
            from kore.data import Encoder

            self._encoder = Encoder.from_pretrained(self.section.path)
        return self._encoder

    @property
    def prompts(self) -> Encoder | ProcessorPrompts:
        """The encoder, or the own processor of a model whose family it does not know: enough to ask questions."""
        from kore.data import Encoder
        from kore.evaluation import load_prompts

        if self._encoder is None:
            found = load_prompts(self.section.path)
            if not isinstance(found, Encoder):
                return found
            self._encoder = found
        return self._encoder

    def conversations(self, section: DataSection, seed: int, require_answer: bool = True) -> Conversations:
        """The conversations of a data section, read once."""
        key = f"{section.model_dump_json()} {seed} {require_answer}"
        if key not in self._read:
            from kore.data import load_conversations

            self._read[key] = load_conversations(
                section.files,
                section.image_root,
                section.format,
                section.on_bad_row,
                section.max_samples,
                seed,
                require_answer=require_answer,
            )
        return self._read[key]

    def forget(self) -> None:
        """Read data files anew from now on: one of them has changed."""
        self._read.clear()

    def base(self, path: str | os.PathLike[str] | None = None) -> torch.nn.Module:
        """The untouched model, or the full model saved at ``path``."""
        wanted = ("base", os.fspath(path if path is not None else self.section.path))
        if self._holds != wanted:
            from kore.models import load_model

            self.drop()
            self._model = load_model(wanted[1], dtype=self.section.dtype, device=_device(self.section.device))
            self._holds = wanted
        assert self._model is not None
        return self._model

    def adapted(self, adapter: Path, trainable: bool = False) -> torch.nn.Module:
        """The base model with the adapter saved at ``adapter``."""
        if self._holds != _adapted(adapter, trainable):
            if not adapter.is_dir():
                raise ArtifactError(f"{adapter}: no such adapter directory")
            from kore.adapter import load_adapter

            self.put_adapted(load_adapter(self.base(), adapter, trainable), adapter, trainable)
        assert self._model is not None
        return self._model

    def put_adapted(self, model: torch.nn.Module, adapter: Path, trainable: bool) -> None:
        """Keep a model that now equals what :meth:`adapted` would load."""
        self._model, self._holds = model, _adapted(adapter, trainable)

    def put_base(self, model: torch.nn.Module, path: Path) -> None:
        """Keep a model that now equals the full model saved at ``path``."""
        self._model, self._holds = model, ("base", os.fspath(path))

    def held(self) -> torch.nn.Module | None:
        """The model in memory, as the last stage left it; None where there is none."""
        return self._model

    def drop(self) -> None:
        """Free the model: its memory, or its state after something has changed it."""
        self._model, self._holds = None, ()
        gc.collect()


def _adapted(adapter: Path, trainable: bool) -> tuple[str, ...]:
    return ("adapter", os.fspath(adapter), "trainable" if trainable else "")


def _device(device: str) -> str:
    """The device of this process: with several processes, each has its own GPU."""
    rank = os.environ.get("LOCAL_RANK")
    if device == "auto" and rank is not None:
        import torch

        if torch.cuda.is_available():
            return f"cuda:{rank}"
    return device
