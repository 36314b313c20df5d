"""The stages as single commands: capture, init, train, merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kore.cli import console
from kore.errors import ConfigError

Model = Annotated[str, typer.Option("--model", "-m", help="Model directory, or a hub id (owner/name).")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Directory for the result.")]
Data = Annotated[list[Path], typer.Option("--data", "-d", help="Conversation file; may be repeated.")]
ImageRoot = Annotated[Path | None, typer.Option(help="Folder of the images; by default that of the data file.")]
Format = Annotated[str, typer.Option(help="auto, llava, sharegpt or openai.")]
OnBadRow = Annotated[str, typer.Option(help="What to do with a bad row: fail or skip.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
RecipeName = Annotated[
    str | None,
    typer.Option("--recipe", help="Whose settings to take: default, paper or official; options replace them."),
]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting; repeatable.")]

# Written out, not imported: help must come at once.
_METHODS = "kore, lora, random-a, lora-null-v1, lora-null-v2, replay, ewc, lwf, moelora, o-lora, sefe, cia"


def capture(
    model: Model,
    data: Data,
    output: Output,
    image_root: ImageRoot = None,
    gradients: Annotated[
        bool,
        typer.Option("--gradients", help="Capture the gradients at the layers' outputs, for kore train --protect."),
    ] = False,
    recipe: RecipeName = None,
    max_samples: Annotated[int | None, typer.Option(help="Samples drawn from the data; by default 256.")] = None,
    targets: Annotated[str | None, typer.Option(help="Layers: names separated by commas, or one expression.")] = None,
    normalize: Annotated[str | None, typer.Option(help="none, or official (x / |max x| per sample).")] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Which tokens count: prompt (by default), all, image, text or answer.")
    ] = None,
    memory_budget: Annotated[
        str | None, typer.Option(help="Memory for the covariances on each device, for example 12GiB.")
    ] = None,
    batch_size: Annotated[int, typer.Option()] = 4,
    format: Format = "auto",
    on_bad_row: OnBadRow = "fail",
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    set: Set = None,
) -> None:
    """Capture the covariance of every layer's input on old data, or of the gradients at its output.

    Example: `kore capture -m models/llava -d old.json --image-root images -o runs/a/covariance`

    Several processes, each with its share of the samples: `torchrun --nproc-per-node 4 -m kore capture ...`

    For two-sided protection, the same with `--gradients -o runs/a/gradients`.
    """
    from kore.pipeline.capture import CaptureStage, GradientStage
    from kore.pipeline.config import CaptureSection, OldSection, ProtectionSection

    old = {"files": data, "image_root": image_root, "format": format, "on_bad_row": on_bad_row}
    own = {"memory_budget": memory_budget, "batch_size": batch_size}
    options = _options(
        {"old": OldSection, "capture": CaptureSection, "protection": ProtectionSection},
        {
            **_model(model, dtype, device),
            "old": {**old, **_given(max_samples=max_samples)},
            "capture": {"targets": _names(targets), **own, **_given(normalize=normalize, tokens=tokens)},
            "protection": own,
        },
        set,
        recipe,
    )
    common = (output.absolute(), options.model, options.old, options.capture, seed)
    _run(GradientStage(*common, protection=options.protection) if gradients else CaptureStage(*common), options.model)


def init(
    model: Model,
    output: Output,
    covariance: Annotated[
        list[Path] | None, typer.Option("--covariance", "-c", help="Result of kore capture; repeat it to mix several.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Of the covariances or groups: balanced (by default), or numbers such as 1,2.")
    ] = None,
    group: Annotated[
        list[str] | None, typer.Option(help="Take only this group of a balanced capture; repeatable.")
    ] = None,
    method: Annotated[str, typer.Option(help=f"{_METHODS}.")] = "kore",
    recipe: RecipeName = None,
    rank: Annotated[
        str | None, typer.Option(help="A number (by default 64), match-lora-R (the size of LoRA rank R), or energy:τ.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    set: Set = None,
) -> None:
    """Make an untrained adapter; for method kore, one that the old data does not see.

    Stopped and started again, it goes on where it was. Rank energy:0.001 takes, layer by layer, the largest rank that
    reads less than this share of the old inputs' energy.

    Example: `kore init -m models/llava -c runs/a/covariance --rank match-lora-128 -o runs/a/adapter-init`

    Variants: `--set adapter.train_a=true`, `--set adapter.strength=0.5`, `--group mme`, `-c a -c b --weights 1,2`

    Several processes, which share the work and make the same adapter: `torchrun --nproc-per-node 4 -m kore init ...`
    """
    from kore.pipeline.config import AdapterSection
    from kore.pipeline.stages import InitStage

    options = _options(
        {"adapter": AdapterSection},
        {
            **_model(model, dtype, device),
            "adapter": {"method": method, **_given(rank=rank, groups=group, weights=_weights(weights))},
        },
        set,
        recipe,
    )
    if options.adapter.baseline().in_full:
        raise ConfigError(f"adapter.method: {options.adapter.method} has no adapter to make; use kore train --full")
    if options.adapter.needs_covariance and not covariance:
        raise ConfigError(f"--covariance: method {options.adapter.method} needs the result of kore capture")
    paths = [path.absolute() for path in covariance or []]
    described = _described(recipe, options.adapter, paths)
    stage = InitStage(output.absolute(), options.model, options.adapter, paths or None, seed, recipe=described)
    _run(stage, options.model)


def train(
    model: Model,
    data: Data,
    output: Output,
    adapter: Annotated[Path | None, typer.Option("--adapter", "-a", help="Result of kore init.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Train the whole language model, without an adapter.")] = False,
    protect: Annotated[
        Path | None, typer.Option(help="Covariance of old data to protect; with --protect-gradients.")
    ] = None,
    protect_gradients: Annotated[
        Path | None, typer.Option(help="Result of kore capture --gradients on the same data.")
    ] = None,
    covariance: Annotated[
        Path | None, typer.Option("--covariance", "-c", help="Result of kore capture, for o-lora that holds it.")
    ] = None,
    old: Annotated[
        list[Path] | None,
        typer.Option(
            help="Old conversations, for the methods that train on them or look at them; repeatable. "
            "Their images: --set old.image_root=DIR."
        ),
    ] = None,
    protection_strength: Annotated[str | None, typer.Option(help="λ of the penalty, or auto (by default).")] = None,
    recipe: RecipeName = None,
    image_root: ImageRoot = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate of the adapter.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples per process and step.")] = None,
    format: Format = "auto",
    on_bad_row: OnBadRow = "fail",
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    set: Set = None,
) -> None:
    """Train an adapter on new knowledge. Also works under torchrun.

    Example: `kore train -m models/llava -a runs/a/adapter-init -d new.json -o runs/a/train --set train.epochs=6`

    Several GPUs: `torchrun --nproc-per-node 4 -m kore train ...`

    Two-sided protection: `kore train ... --protect runs/a/covariance --protect-gradients runs/a/gradients`

    EWC on the whole model: `kore train --full ... --old old.json --set adapter.method=ewc-full`
    """
    from kore.pipeline.config import AdapterSection, DataSection, ProtectionSection, TrainSection
    from kore.pipeline.stages import TrainStage
    from kore.processes import process_count

    if full == (adapter is not None):
        raise ConfigError("expected either --adapter (the result of kore init) or --full")
    if (protect is None) != (protect_gradients is None):
        raise ConfigError("--protect and --protect-gradients: expected both, the results of kore capture on old data")
    if protection_strength is not None and protect is None:
        raise ConfigError("--protection-strength: expected --protect and --protect-gradients with it")
    if protect is not None and full:
        raise ConfigError("--protect: it needs an adapter with a frozen A; leave --full out")
    strength = {} if protect is None else {"strength": _number(protection_strength or "auto")}
    named = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size}
    sections: dict[str, Any] = {"new": DataSection, "train": TrainSection, "protection": ProtectionSection}
    options = _options(
        {**sections, **({"old": DataSection} if old else {}), **({"adapter": AdapterSection} if full else {})},
        {
            **_model(model, dtype, device),
            **({"adapter": {"method": "full"}} if full else {}),
            **({"old": {"files": old, "format": format, "on_bad_row": on_bad_row}} if old else {}),
            "new": {"files": data, "image_root": image_root, "format": format, "on_bad_row": on_bad_row},
            "train": {"seed": seed, **_given(**named)},
            "protection": strength,
        },
        set,
        recipe,
    )
    if protect is None and options.protection.strength is not None:
        raise ConfigError("protection.strength: expected --protect and --protect-gradients with it")
    if full and not options.adapter.baseline().in_full:
        raise ConfigError(f"--full: method {options.adapter.method} trains an adapter; make it with kore init")
    stage = TrainStage(
        output.absolute(),
        options.model,
        options.new,
        options.train,
        _absolute(adapter),
        seed,
        protection=options.protection,
        covariance=_absolute(protect or covariance),
        gradients=_absolute(protect_gradients),
        recipe=recipe,
        old=getattr(options, "old", None),
        in_full=options.adapter if full else None,
    )
    if process_count() > 1:
        from kore.pipeline.workbench import Workbench

        console.stage("train", "done", stage.run(Workbench(options.model, console.interactive())))
    else:
        _run(stage, options.model)


def merge(
    model: Model,
    adapter: Annotated[Path, typer.Option("--adapter", "-a", help="A trained adapter.")],
    output: Output,
) -> None:
    """Write a full model with the adapter merged into its weights.

    Example: `kore merge -m models/llava -a runs/a/train/adapter -o models/llava-new`
    """
    from kore.merging import merge as merge_adapter

    merge_adapter(model, adapter, output)
    console.say(f"merged model: {output}")


def _run(stage: Any, model: Any) -> None:
    from kore.pipeline.stage import only_one, run_stages
    from kore.pipeline.workbench import Workbench
    from kore.processes import process_count

    if process_count() > 1:
        from kore.pipeline.together import run_together

        run_together(stage, Workbench(model, console.interactive()), console.stage)
    else:
        with only_one(stage.output):
            run_stages([stage], Workbench(model, console.interactive()), console.stage)
    console.say(f"result: {stage.output}")


def _options(
    sections: dict[str, Any], values: dict[str, Any], overrides: list[str] | None, recipe: str | None = None
) -> Any:
    from pydantic import ConfigDict, create_model

    from kore.pipeline.config import DataSection, ModelSection
    from kore.pipeline.loading import parse_options
    from kore.recipes import with_recipe

    # A recipe says how old data are captured, not how they are trained on.
    data = {name: value for name, value in values.items() if sections.get(name) is DataSection}
    filled = {**with_recipe(recipe or "default", {k: v for k, v in values.items() if k not in data}), **data}
    values = {name: value for name, value in filled.items() if name in values}
    fields: dict[str, Any] = {name: (section, ...) for name, section in {"model": ModelSection, **sections}.items()}
    root = create_model("Options", __config__=ConfigDict(extra="forbid"), **fields)
    return parse_options(root, values, overrides or [])


def _model(path: str, dtype: str, device: str) -> dict[str, Any]:
    return {"model": {"path": path, "dtype": dtype, "device": device}}


def _given(**values: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in values.items() if value is not None}


def _number(text: str) -> Any:
    import yaml

    return yaml.safe_load(text)


def _weights(text: str | None) -> Any:
    """Numbers where there are commas, else the word."""
    if text is None or not any(letter.isdigit() for letter in text):
        return text
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--weights: expected balanced or numbers separated by commas, got {text!r}") from None


def _described(recipe: str | None, adapter: Any, covariance: list[Path]) -> dict[str, Any]:
    """The recipe of an untrained adapter, and how it and the covariance differ from it."""
    from kore.artifacts import MANIFEST
    from kore.mixing import open_mixture
    from kore.recipes import capture_sections, describe

    sections = {"adapter": adapter.model_dump(mode="json")}
    name = recipe or "default"
    if covariance and all((path / MANIFEST).is_file() for path in covariance):
        sections |= capture_sections(name, open_mixture(covariance, adapter.chosen_groups, adapter.weights))
    return describe(name, sections)


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()


def _names(targets: str | None) -> str | list[str] | None:
    """One expression, or several names when there are commas."""
    if targets is None or "," not in targets:
        return targets
    return [name.strip() for name in targets.split(",")]
