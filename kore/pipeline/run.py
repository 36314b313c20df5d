"""``kore run``: the stages of a configuration, in order, in one run directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kore.artifacts import atomic_write
from kore.pipeline.augment import AugmentStage
from kore.pipeline.capture import CaptureStage, GradientStage
from kore.pipeline.config import OldSection, RunConfig
from kore.pipeline.loading import dump_config
from kore.pipeline.report import ReportStage
from kore.pipeline.stage import Say, Stage, only_one, run_stages
from kore.pipeline.stages import EvalStage, InitStage, TrainStage
from kore.pipeline.workbench import Workbench


def build_stages(config: RunConfig) -> list[Stage[Workbench]]:
    """The stages a configuration asks for.

    The untouched model is evaluated before the adapter is made, so that capture, evaluation and initialisation
    share one loaded model. Capture is left out where neither the method nor a protection has a use for it.
    """
    out, model, seed = config.output_dir, config.model, config.seed
    method, protect = config.adapter.baseline(), config.protection.strength is not None
    stages: list[Stage[Workbench]] = []
    if config.augment is not None:
        stages.append(AugmentStage(config.augmented.parent, config.augment, out / "augment-cache"))
    covariance = gradients = init = None
    if config.old is not None and (protect or method.reads_covariance or method.penalty_reads_covariance):
        covariance = out / "covariance"
        stages.append(CaptureStage(covariance, model, config.old, config.capture, seed))
        if config.capture.new_samples:
            sample = OldSection(
                **{**config.new_data.model_dump(), "max_samples": config.capture.new_samples}, balance=False
            )
            new_inputs = out / "covariance-new"
            stages.append(CaptureStage(new_inputs, model, sample, config.capture, seed, name="capture-new"))
    if config.old is not None and protect:
        gradients = out / "gradients"
        stages.append(GradientStage(gradients, model, config.old, config.capture, seed, protection=config.protection))
    asks = bool(config.eval.new or config.eval.old)
    if asks:
        stages.append(EvalStage(out / "eval" / "before", model, config.eval, name="eval-before"))
    if not method.in_full:
        init = out / "adapter-init"
        targets = config.adapter.targets if config.adapter.targets is not None else config.capture.targets
        adapter = config.adapter.model_copy(update={"targets": targets})
        stages.append(
            InitStage(init, model, adapter, covariance, seed, recipe=config.described("old", "capture", "adapter"))
        )
    train = TrainStage(
        out / "train",
        model,
        config.new_data,
        config.train,
        init,
        seed,
        protection=config.protection,
        covariance=covariance,
        gradients=gradients,
        recipe=config.recipe,
        old=config.old_conversations,
        in_full=config.adapter if method.in_full else None,
    )
    stages.append(train)
    if asks:
        trained = {"full_model": train.result} if init is None else {"adapter": train.result}
        stages.append(EvalStage(out / "eval" / "after", model, config.eval, **trained, name="eval-after"))
    stages.append(ReportStage(config))
    return stages


def stage_names(config: RunConfig) -> list[str]:
    """The names of the stages a configuration asks for."""
    return [stage.name for stage in build_stages(config)]


def run_pipeline(config: RunConfig, say: Say, rerun: Sequence[str] = (), progress: bool = True) -> Path:
    """Run every stage that is not done; returns the path of the report.

    Args:
        config: The configuration; written to ``config.yaml`` in the run directory.
        say: Called with (stage, "done" | "skipped" | "runs", remark).
        rerun: Names of stages to run again although they are done.
        progress: Show progress bars.

    Raises:
        KoreError: Something the configuration names is wrong, or another process works in the run directory.
    """
    stages = build_stages(config)
    with only_one(config.output_dir):
        atomic_write(config.output_dir / "config.yaml", dump_config(config))
        run_stages(stages, Workbench(config.model, progress), say, rerun)
    return config.output_dir / "report.html"
