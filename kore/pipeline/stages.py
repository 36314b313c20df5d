"""The stages from the adapter on: init, train, eval. ``kore run`` and the single commands use these same classes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kore.artifacts import MANIFEST, atomic_write, file_sha256, read_json
from kore.pipeline.config import (
    AdapterSection,
    DataSection,
    EvalSection,
    ModelSection,
    ProtectionSection,
    QuestionSet,
    TrainSection,
)
from kore.pipeline.inputs import data_inputs, flat, model_inputs
from kore.pipeline.launch import train_in_processes
from kore.pipeline.stage import directory_identity, model_identity
from kore.pipeline.workbench import Workbench
from kore.processes import is_main_process, process_count

if TYPE_CHECKING:
    from kore.baselines import Baseline
    from kore.covariance import CovarianceSet
    from kore.evaluation import EvalResult
    from kore.protection import TwoSided


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
        return {**model_inputs(self.model), **flat("adapter", self.settings), **covariance, "seed": self.seed}

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
            trains_a = settings.train_a or settings.baseline().trains_a
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

    With a protection, ``covariance`` and ``gradients`` are those of the old data. ``old`` are old conversations, for
    the methods that train on them or look at them. ``in_full`` says by which method the model is trained in full,
    plainly if it is None. ``recipe`` is the name that an adapter without one gets.
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
    old: DataSection | None = None
    in_full: AdapterSection | None = None

    @property
    def result(self) -> Path:
        """The trained adapter, or the trained model."""
        return self.output / ("model" if self.init is None else "adapter")

    @property
    def holds_covariance(self) -> bool:
        """Whether the method's penalty looks at the covariance of old inputs."""
        return self._method().penalty_reads_covariance

    def inputs(self) -> dict[str, Any]:
        init = {"adapter-init": directory_identity(self.init)} if self.init is not None else {}
        settings = {**self.settings.settings().identity(), "processes": self.settings.processes}
        own = {**model_inputs(self.model), **data_inputs("new", self.new), **flat("train", settings), **init}
        method = self._method()
        if self.init is None and method.method != "full":
            own |= {"adapter.method": method.method, **flat("adapter", dict(method.describe()))}
        if self.old is not None and method.reads_old:
            own |= data_inputs("old", self.old)
        if self.covariance is not None and self.holds_covariance:
            own["covariance"] = directory_identity(self.covariance)
        if self.protection.strength is None:
            return own
        assert self.covariance is not None and self.gradients is not None
        used = self.protection.model_dump(include={"strength", "max_divergence", "components", "dtype"})
        if self.protection.strength != "auto":
            del used["max_divergence"]
        old = {"covariance": self.covariance, "gradients": self.gradients}
        return {**own, **flat("protection", used), **{name: directory_identity(path) for name, path in old.items()}}

    def complete(self) -> bool:
        return self.result.is_dir()

    def check(self, context: Workbench) -> None:
        if self.new.there:
            context.conversations(self.new, self.seed)
        if self.old is None:
            self._method().check_old(())
        else:
            context.conversations(self.old, self.seed)

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
        from kore.baselines import Preparation
        from kore.training import train

        method = self._method()
        uses_old = self.old is not None and method.reads_old
        old = context.conversations(self.old, self.seed) if uses_old and self.old is not None else ()
        conversations = method.conversations(context.conversations(self.new, self.seed), old, self.seed)
        if self.init is None:
            model = method.prepare(context.base(), Preparation())
        else:
            model = context.adapted(self.init, trainable=True)
        context.drop()
        settings = self.settings.settings()
        settings.progress = settings.progress and context.progress
        cov = None
        if self.covariance is not None and self.holds_covariance:
            from kore.covariance import load_covariance

            cov = load_covariance(self.covariance)
        result = train(
            model,
            context.encoder,
            conversations,
            settings,
            self.output,
            penalty=self._protection(model) or method.penalty(model, context.encoder, old, cov),
            recipe=self.recipe,
        )
        if self.init is None:
            context.put_base(result.model, self.result)
        else:
            context.put_adapted(result.model, self.result, trainable=False)

    def _method(self) -> Baseline:
        """The method that made the adapter to start from, or that trains the model in full."""
        from kore.baselines import baseline, baseline_of

        if self.init is not None:
            return baseline_of(self.init)
        return baseline("full") if self.in_full is None else self.in_full.baseline()

    def _protection(self, model: Any) -> TwoSided | None:
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
        return {**model_inputs(self.model), **adapter, **full, **asked, **tokens}

    def complete(self) -> bool:
        """Whether the scores are there, by the measures that are asked for: others need no new answers."""
        file = self.output / "scores.json"
        return file.is_file() and read_json(file).get("measures") == self._measures()

    def _measures(self) -> dict[str, str]:
        return {"cem": self.settings.cem, "f1": self.settings.f1}

    def check(self, context: Workbench) -> None:
        for _, questions in self._sets():
            self._questions(questions)

    def _questions(self, questions: QuestionSet) -> Any:
        from kore.data import load_questions

        return load_questions(questions.file, questions.image_root, self.settings.on_bad_row)

    def run(self, context: Workbench) -> str:
        from kore.evaluation import Measures, evaluate
        from kore.evaluation.summary import Run, scores_of

        if self.adapter is not None:
            model = context.adapted(self.adapter)
        else:
            model = context.base(self.full_model)
        results: dict[str, dict[str, EvalResult]] = {"new": {}, "old": {}}
        for group, questions in self._sets():
            results[group][questions.name] = evaluate(
                model,
                context.prompts,
                self._questions(questions),
                batch_size=self.settings.batch_size,
                max_new_tokens=self.settings.max_new_tokens,
                output=self.output / group / questions.name,
                progress=context.progress,
                cem=self.settings.cem,
                f1=self.settings.f1,
                on_bad_question=self.settings.on_bad_row,
            )
        scores = scores_of(Run(**results), Measures(self.settings.cem, self.settings.f1))
        if is_main_process():
            atomic_write(self.output / "scores.json", json.dumps(scores, indent=2) + "\n")
        asked = sum(result.overall.count for group in results.values() for result in group.values())
        names = {"K.A": scores["ka"], "K.R": scores["kr"]}
        return ", ".join(
            [f"{asked} questions", *(f"{name} {value:.2f}" for name, value in names.items() if value is not None)]
        )

    def _sets(self) -> list[tuple[str, QuestionSet]]:
        return [("new", one) for one in self.settings.new] + [("old", one) for one in self.settings.old]
