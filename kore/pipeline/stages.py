"""The stages: capture, init, train, eval. ``kore run`` and the single commands use these same classes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kore.artifacts import MANIFEST, atomic_write, file_sha256, read_json
from kore.errors import ConfigError
from kore.metrics import knowledge_retention
from kore.pipeline.config import (
    AdapterSection,
    CaptureSection,
    DataSection,
    EvalSection,
    ModelSection,
    OldSection,
    ProtectionSection,
    QuestionSet,
    TrainSection,
)
from kore.pipeline.launch import train_in_processes
from kore.pipeline.stage import directory_identity, model_identity
from kore.pipeline.together import own_share, save_once
from kore.pipeline.workbench import Workbench
from kore.processes import is_main_process, process_count

if TYPE_CHECKING:
    from kore.covariance import CovarianceSet
    from kore.data import Conversation
    from kore.protection import TwoSided


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
            **_model_inputs(self.model),
            **_data_inputs("old", self.old),
            **_flat("capture", settings),
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
            **_model_inputs(self.model),
            **_data_inputs("old", self.old),
            **settings,
            **_flat("protection", own),
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


@dataclass(frozen=True)
class InitStage:
    """The untrained adapter, saved at ``output``.

    Methods that read the old inputs' null space need ``covariance``: one result of capture, of which ``settings`` may
    choose groups, or several, to be mixed by the weights of ``settings``.
    """

    output: Path
    model: ModelSection
    settings: AdapterSection
    covariance: Path | Sequence[Path] | None = None
    seed: int = 0
    name: str = "init"
    recipe: Mapping[str, Any] | None = None
    """What :func:`kore.recipes.describe` says of the capture and the adapter; goes into ``kore.json``."""

    def inputs(self) -> dict[str, Any]:
        from kore.mixing import sources

        paths = self._paths()
        read = sources(paths, self.settings.chosen_groups) if paths else {}
        covariance = {f"covariance.{name}": directory_identity(path) for name, path in read.items()}
        if len(paths) == 1 and self.settings.chosen_groups is None:
            covariance = {"covariance": directory_identity(paths[0])}
        return {**_model_inputs(self.model), **_flat("adapter", self.settings), **covariance, "seed": self.seed}

    def complete(self) -> bool:
        return (self.output / "adapter_config.json").is_file()

    def check(self, context: Workbench) -> None:
        from kore.adapter.rank import energy_share, resolve_rank
        from kore.covariance import load_covariance
        from kore.models import check_fingerprint, resolve_targets

        paths, settings = self._paths(), self.settings
        for path in paths:
            if (path / MANIFEST).is_file():
                check_fingerprint(load_covariance(path).fingerprint, context.base(), f"the covariance {path}")
        names = resolve_targets(context.base(), settings.targets)
        if not paths or energy_share(settings.rank) is None:
            trains_a = settings.train_a or settings.method == "lora-null-v1"
            resolve_rank(context.base(), names, settings.rank, trains_a)

    def run(self, context: Workbench) -> str:
        from kore.adapter import save_adapter
        from kore.baselines import prepare_model

        covariance = self._covariance() if self._paths() else None
        options = self.settings.model_dump(exclude={"method", "groups", "weights"})
        base = context.base()
        context.drop()
        model: Any = prepare_model(
            base,
            self.settings.method,
            cov=covariance,
            seed=self.seed,
            progress=context.progress,
            checkpoint=self.output / "checkpoint",
            **options,
        )
        if self.recipe is not None:
            model.kore_info["recipe"] = dict(self.recipe)
        if is_main_process():
            save_adapter(model, self.output)
        context.put_adapted(model, self.output, trainable=True)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return f"{self.settings.method}, {trainable:,} trainable parameters"

    def _paths(self) -> list[Path]:
        if self.covariance is None or not self.settings.needs_covariance:
            return []
        return [self.covariance] if isinstance(self.covariance, Path) else list(self.covariance)

    def _covariance(self) -> CovarianceSet:
        from kore.mixing import open_mixture

        return open_mixture(self._paths(), self.settings.chosen_groups, self.settings.weights)


@dataclass(frozen=True)
class TrainStage:
    """Training on the new data; ``init`` is the adapter to start from, None trains the model in full.

    With a protection, ``covariance`` and ``gradients`` are those of the old data. ``recipe`` is the name that an
    adapter without one gets.
    """

    output: Path
    model: ModelSection
    new: DataSection
    settings: TrainSection
    init: Path | None = None
    seed: int = 0
    name: str = "train"
    protection: ProtectionSection = field(default_factory=ProtectionSection)
    covariance: Path | None = None
    gradients: Path | None = None
    recipe: str | None = None

    @property
    def result(self) -> Path:
        """The trained adapter, or the trained model."""
        return self.output / ("model" if self.init is None else "adapter")

    def inputs(self) -> dict[str, Any]:
        init = {"adapter-init": directory_identity(self.init)} if self.init is not None else {}
        settings = {**self.settings.settings().identity(), "processes": self.settings.processes}
        own = {**_model_inputs(self.model), **_data_inputs("new", self.new), **_flat("train", settings), **init}
        if self.protection.strength is None:
            return own
        assert self.covariance is not None and self.gradients is not None
        used = self.protection.model_dump(include={"strength", "max_divergence", "components", "dtype"})
        if self.protection.strength != "auto":
            del used["max_divergence"]
        old = {"covariance": self.covariance, "gradients": self.gradients}
        return {**own, **_flat("protection", used), **{name: directory_identity(path) for name, path in old.items()}}

    def complete(self) -> bool:
        return self.result.is_dir()

    def check(self, context: Workbench) -> None:
        if self.new.there:
            context.conversations(self.new, self.seed)

    def run(self, context: Workbench) -> str:
        if self.settings.processes > 1 and process_count() == 1:
            context.drop()
            train_in_processes(self)
        else:
            self._train_here(context)
        history = read_json(self.output / "history.json")
        losses = [entry["loss"] for entry in history if "loss" in entry]
        steps = max((entry.get("step", 0) for entry in history), default=0)
        words = [f"{steps} steps"] + ([f"loss {losses[0]:.3f} → {losses[-1]:.3f}"] if losses else [])
        paid = [entry["old_divergence"] for entry in history if "old_divergence" in entry]
        if paid:
            words.append(f"{paid[-1]:.2g} nats for each old token")
        return ", ".join(words)

    def _train_here(self, context: Workbench) -> None:
        from kore.baselines import prepare_model
        from kore.training import train

        conversations = context.conversations(self.new, self.seed)
        if self.init is None:
            model = prepare_model(context.base(), "full")
        else:
            model = context.adapted(self.init, trainable=True)
        context.drop()
        settings = self.settings.settings()
        settings.progress = settings.progress and context.progress
        result = train(
            model,
            context.encoder,
            conversations,
            settings,
            self.output,
            protection=self._penalty(model),
            recipe=self.recipe,
        )
        if self.init is None:
            context.put_base(result.model, self.result)
        else:
            context.put_adapted(result.model, self.result, trainable=False)

    def _penalty(self, model: Any) -> TwoSided | None:
        if self.protection.strength is None:
            return None
        from kore.covariance import load_covariance, load_output_gradients
        from kore.protection import two_sided

        assert self.covariance is not None and self.gradients is not None
        return two_sided(
            model,
            load_covariance(self.covariance),
            load_output_gradients(self.gradients),
            self.protection.strength,
            max_divergence=self.protection.max_divergence,
            components=self.protection.components,
            dtype=self.protection.dtype,
        )


@dataclass(frozen=True)
class EvalStage:
    """Answers to the question sets, saved below ``output``.

    ``adapter`` and ``full_model`` say which model is asked; without either it is the untouched one.
    """

    output: Path
    model: ModelSection
    settings: EvalSection
    adapter: Path | None = None
    full_model: Path | None = None
    name: str = "eval"

    def inputs(self) -> dict[str, Any]:
        adapter = {"adapter": directory_identity(self.adapter)} if self.adapter is not None else {}
        full = {"trained model": model_identity(str(self.full_model))} if self.full_model is not None else {}
        asked = {
            f"eval.{group}.{questions.name}": [file_sha256(questions.file), str(questions.image_root)]
            for group, questions in self._sets()
        }
        tokens = {"eval.max_new_tokens": self.settings.max_new_tokens}
        return {**_model_inputs(self.model), **adapter, **full, **asked, **tokens}

    def complete(self) -> bool:
        return (self.output / "scores.json").is_file()

    def check(self, context: Workbench) -> None:
        for _, questions in self._sets():
            self._questions(questions)

    def _questions(self, questions: QuestionSet) -> Any:
        from kore.data import load_questions

        return load_questions(questions.file, questions.image_root, self.settings.on_bad_row)

    def run(self, context: Workbench) -> str:
        from kore.evaluation import evaluate

        if self.adapter is not None:
            model = context.adapted(self.adapter)
        else:
            model = context.base(self.full_model)
        scores: dict[str, Any] = {"new": {}, "old": {}}
        for group, questions in self._sets():
            result = evaluate(
                model,
                context.encoder,
                self._questions(questions),
                batch_size=self.settings.batch_size,
                max_new_tokens=self.settings.max_new_tokens,
                output=self.output / group / questions.name,
                progress=context.progress,
            )
            scores[group][questions.name] = {**result.scores(), "mean": result.overall.mean}
        scores |= summary(scores)
        atomic_write(self.output / "scores.json", json.dumps(scores, indent=2) + "\n")
        asked = sum(result["overall"]["count"] for group in ("new", "old") for result in scores[group].values())
        measures = [f"{label} {scores[key]:.2f}" for key, label in _MEASURES if scores[key] is not None]
        return ", ".join([f"{asked} questions", *measures])

    def _sets(self) -> list[tuple[str, QuestionSet]]:
        return [("new", one) for one in self.settings.new] + [("old", one) for one in self.settings.old]


_MEASURES = (("ka", "K.A"), ("kr", "K.R"))


def summary(scores: dict[str, Any]) -> dict[str, float | None]:
    """K.A, the mean over the new question sets of mean(CEM, F1), and K.R, the mean CEM over the old sets."""
    new = [one["mean"] for one in scores["new"].values()]
    old = [one["overall"]["cem"] for one in scores["old"].values()]
    return {"ka": sum(new) / len(new) if new else None, "kr": knowledge_retention(old) if old else None}


def _model_inputs(model: ModelSection) -> dict[str, Any]:
    return {"model": model_identity(model.path), "model.dtype": model.dtype}


def _data_inputs(prefix: str, section: DataSection) -> dict[str, Any]:
    settings = section.model_dump(mode="json", exclude={"files"})
    return {f"{prefix}.files": [file_sha256(file) for file in section.files], **_flat(prefix, settings)}


def _flat(prefix: str, settings: Any) -> dict[str, Any]:
    values = settings if isinstance(settings, dict) else settings.model_dump(mode="json")
    return {f"{prefix}.{name}": value for name, value in values.items()}
