"""The stages that look at old data: the covariances of its inputs, and its output gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kore.artifacts import MANIFEST
from kore.errors import ConfigError
from kore.pipeline.config import CaptureSection, ModelSection, OldSection, ProtectionSection
from kore.pipeline.inputs import data_inputs, flat, model_inputs
from kore.pipeline.together import own_share, save_once
from kore.pipeline.workbench import Workbench

if TYPE_CHECKING:
    from kore.covariance import CovarianceSet
    from kore.data import Conversation


@dataclass(frozen=True)
class CaptureStage:
    """Covariances of the inputs that the ``old`` data gives, saved at ``output``."""

    output: Path
    model: ModelSection
    old: OldSection
    settings: CaptureSection
    seed: int = 0
    name: str = "capture"

    def inputs(self) -> dict[str, Any]:
        settings = self.settings.model_dump(exclude={"new_samples", "memory_budget", "keep_groups"})
        return {
            **model_inputs(self.model),
            **data_inputs("old", self.old),
            **flat("capture", settings),
            "seed": self.seed,
        }

    def complete(self) -> bool:
        return (self.output / MANIFEST).is_file()

    def check(self, context: Workbench) -> None:
        if self.old.there:
            self._conversations(context)

    def _conversations(self, context: Workbench) -> Any:
        return context.conversations(self.old, self.seed, require_answer=self.settings.tokens != "prompt")

    def run(self, context: Workbench) -> str:
        from kore.covariance import group_folder

        conversations = self._conversations(context)
        if self.old.balanced:
            parts = {}
            for number, (group, members) in enumerate(_by_group(self.old, conversations).items()):
                folder = group_folder(self.output, number)
                if not (folder / MANIFEST).is_file():
                    save_once(self._capture(context, own_share(members), folder / "checkpoint"), folder)
                parts[group] = self._load(folder)
            covariance = self._balanced(parts)
            note = f", {len(parts)} groups of data balanced"
        else:
            covariance, note = self._capture(context, own_share(conversations), self.output / "checkpoint"), ""
        save_once(covariance, self.output, keep_groups=self._keeps_groups())
        counted = max(group.tokens for group in covariance.groups)
        modules, groups = len(covariance.modules), len(covariance.groups)
        return f"{len(conversations)} samples, {counted:,} tokens, {modules} layers in {groups} groups{note}"

    def _keeps_groups(self) -> bool:
        return self.settings.keep_groups

    def _load(self, folder: Path) -> CovarianceSet:
        from kore.covariance import load_covariance

        return load_covariance(folder)

    def _balanced(self, parts: dict[str, CovarianceSet]) -> CovarianceSet:
        from kore.covariance import merge_covariance

        return merge_covariance(parts, weights="balanced")

    def _batches(self, context: Workbench, conversations: Sequence[Conversation], batch_size: int) -> Any:
        from kore.data import conversation_batches, prompt_batches

        make_batches = prompt_batches if self.settings.tokens == "prompt" else conversation_batches
        return make_batches(conversations, context.encoder, batch_size)

    def _capture(self, context: Workbench, conversations: Sequence[Conversation], checkpoint: Path) -> CovarianceSet:
        import torch

        from kore.capture import capture_covariance

        tokens = self.settings.tokens
        covariance = capture_covariance(
            context.base(),
            self._batches(context, conversations, self.settings.batch_size),
            targets=self.settings.targets,
            normalize=self.settings.normalize,
            progress=context.progress,
            tokens="all" if tokens == "prompt" else tokens,
            memory_budget=self.settings.memory_budget,
            checkpoint=checkpoint,
            checkpoint_every=self.settings.checkpoint_every,
            dtype=getattr(torch, self.settings.dtype),
        )
        covariance.selection = tokens
        return covariance


@dataclass(frozen=True)
class GradientStage(CaptureStage):
    """Covariances of the gradients that the ``old`` data gives at the outputs, saved at ``output``.

    The same data, layers and balance as the covariance of the inputs; labels are drawn from the model. Groups are
    balanced row for row: G / N = (1/n) Σ_k G_k / N_k, so that the penalty estimates the divergence per old token
    averaged over the groups. (Equal traces, as for C, would protect most what the model's answers feel least.)
    """

    protection: ProtectionSection = field(default_factory=ProtectionSection)
    name: str = "capture-gradients"

    def inputs(self) -> dict[str, Any]:
        captured = ("targets", "tokens", "dtype")
        settings = {f"capture.{name}": value for name, value in self.settings.model_dump().items() if name in captured}
        own = self.protection.model_dump(include={"tokens", "batch_size"})
        return {
            **model_inputs(self.model),
            **data_inputs("old", self.old),
            **settings,
            **flat("protection", own),
            "seed": self.seed,
        }

    def check(self, context: Workbench) -> None:
        if self.protection.tokens == "answer" and self.settings.tokens == "prompt":
            raise ConfigError(
                "protection.tokens: answer needs answers, and capture.tokens: prompt leaves them out; "
                "set capture.tokens to all, or protection.tokens to text"
            )
        super().check(context)

    def _keeps_groups(self) -> bool:
        return False  # nothing asks for a single group's

    def _load(self, folder: Path) -> CovarianceSet:
        from kore.covariance import load_output_gradients

        return load_output_gradients(folder)

    def _balanced(self, parts: dict[str, CovarianceSet]) -> CovarianceSet:
        from kore.covariance import merge_covariance

        counts = [max(1, max(group.tokens for group in part.groups)) for part in parts.values()]
        return merge_covariance(parts, weights=[sum(counts) / (len(counts) * count) for count in counts])

    def _capture(self, context: Workbench, conversations: Sequence[Conversation], checkpoint: Path) -> CovarianceSet:
        import torch

        from kore.capture import capture_output_gradients

        return capture_output_gradients(
            context.base(),
            self._batches(context, conversations, self.protection.batch_size),
            targets=self.settings.targets,
            progress=context.progress,
            tokens=self.protection.tokens,
            seed=self.seed,
            memory_budget=self.protection.memory_budget,
            checkpoint=checkpoint,
            checkpoint_every=self.settings.checkpoint_every,
            dtype=getattr(torch, self.settings.dtype),
        )


def _by_group(old: OldSection, conversations: Sequence[Conversation]) -> dict[str, list[Conversation]]:
    """The conversations of each group that has any, in the order of the files."""
    group_of = dict(zip(old.files, old.file_groups()))
    groups: dict[str, list[Conversation]] = {}
    for conversation in conversations:
        groups.setdefault(group_of[Path(conversation.source.rpartition(":")[0])], []).append(conversation)
    return groups
