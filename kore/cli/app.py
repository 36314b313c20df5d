"""The commands by name. Their modules import what they need when they run."""

from __future__ import annotations

from typing import Annotated

import typer

from kore import __version__
from kore.cli import commands, stages
from kore.cli.analyze import analyze
from kore.cli.augment import augment
from kore.cli.bench import bench
from kore.cli.console import interruptible
from kore.cli.convert import convert
from kore.cli.evaluation import evaluate
from kore.cli.reproduce import reproduce
from kore.cli.retention import retention

app = typer.Typer(
    name="kore",
    help="Teach a multimodal model new knowledge without making it forget.",
    epilog="Start with: kore demo      Then on your own data: kore run CONFIG.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"kore {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and end.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and the libraries' own messages; works anywhere.")
    ] = False,
) -> None:
    """Teach a multimodal model new knowledge without making it forget."""


for _function in (
    commands.demo,
    commands.run,
    augment,
    stages.capture,
    stages.init,
    stages.train,
    stages.merge,
    convert,
    evaluate,
    retention,
    analyze,
    reproduce,
    commands.doctor,
):
    _name = "eval" if _function is evaluate else _function.__name__
    app.command(_name)(interruptible(_function))

app.add_typer(bench, name="bench")
