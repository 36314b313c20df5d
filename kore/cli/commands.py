"""``kore demo``, ``kore run`` and ``kore doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kore.cli import console


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the report and the answers go.")] = Path(
        "kore-demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer methods and seeds: at most 90 seconds.")] = False,
    seeds: Annotated[int, typer.Option(help="Seeds per method; --quick has one.", min=1)] = 2,
    methods: Annotated[str | None, typer.Option(help="Only these methods, separated by commas.")] = None,
) -> None:
    """Compare KORE with its rivals on a small real model; no downloads, a few minutes on a CPU.

    Example: `kore demo --quick`
    """
    from kore.demo.comparison import run as run_demo

    chosen = [name.strip() for name in methods.split(",")] if methods else None
    run_demo(output, quick=quick, seeds=seeds, methods=chosen)


def run(
    config: Annotated[Path, typer.Argument(help="The YAML file of the run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings that replace those of the file.")
    ] = None,
    rerun: Annotated[
        list[str] | None, typer.Option(help="Run this stage again although it is done; may be repeated.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only check the configuration, and show it with all defaults.")
    ] = False,
) -> None:
    """From a model, old data and new knowledge to a trained, evaluated adapter and a report.

    Stages that are done are skipped; a stopped run goes on where it was.

    Example: `kore run examples/tiny.yaml train.learning_rate=1e-3`
    """
    from kore.pipeline.loading import dump_config, load_config
    from kore.pipeline.run import run_pipeline, stage_names

    settings = load_config(config, overrides or [])
    if check:
        console.say(dump_config(settings))
        console.say(f"recipe: {settings.recipe_line()}")
        console.say(f"{config} is valid; stages: {', '.join(stage_names(settings))}")
        return
    report = run_pipeline(settings, console.stage, rerun=rerun or [], progress=console.interactive())
    console.say(f"report: {report}")


def doctor() -> None:
    """Say what this machine can do, and whether `kore run` can work here.

    Ends with status 0 when it can, 1 when it cannot.

    Example: `kore doctor`
    """
    from kore.doctor import examine

    checks = examine()
    for check in checks:
        console.check(check.name, check.state, check.detail)
    failed = [check.name for check in checks if check.state == "missing"]
    if failed:
        console.say(f"\nkore run cannot work here: {', '.join(failed)}")
        raise typer.Exit(1)
    console.say("\nkore run can work here.")
