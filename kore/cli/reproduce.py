"""``kore reproduce``: the paper's comparison, on small models made here or with the real ones."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from kore.cli import console
from kore.errors import ConfigError


class Scale(str, Enum):
    mini = "mini"
    paper = "paper"


def reproduce(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where everything goes; run again to go on.")],
    scale: Annotated[Scale, typer.Option(help="mini: small models, made here. paper: the real ones.")] = Scale.mini,
    quick: Annotated[
        bool, typer.Option("--quick", help="mini: does it run? Under ten minutes; proves nothing.")
    ] = False,
    tune: Annotated[bool, typer.Option("--tune", help="mini: measure learning rates and strengths anew.")] = False,
    rows: Annotated[str | None, typer.Option(help="Only these rows, separated by commas.")] = None,
    processes: Annotated[int, typer.Option(help="mini: at a time, each on one core.", min=1)] = 2,
    data: Annotated[Path | None, typer.Option(help="paper: the folder that holds the data.")] = None,
    check: Annotated[bool, typer.Option("--check", help="paper: write configurations, say what is missing.")] = False,
) -> None:
    """Every table of the paper, with every baseline, from one command.

    `--scale mini` pre-trains small models of the real classes in several worlds, runs every row in each of them and
    says which of the paper's observations hold. About an hour on two cores; a stopped run goes on where it was.

    `--scale paper` writes a configuration for `kore run` for every row with the real models, and runs those whose files
    are there.

    Example: `kore reproduce --scale mini --quick -o runs/mini`
    """
    chosen = [name.strip() for name in rows.split(",")] if rows else None
    if scale is Scale.paper:
        if quick or tune:
            raise ConfigError(f"--{'quick' if quick else 'tune'} is for --scale mini")
        from kore.reproduce.paper import run_paper

        run_paper(output, data or Path("data"), console.say, chosen, check, console.stage)
        return
    if data is not None or check:
        raise ConfigError(f"--{'check' if check else 'data'} is for --scale paper; the miniature makes its own data")
    if tune:
        if quick:
            raise ConfigError("--tune: expected without --quick; the rates are for full runs")
        from kore.reproduce.tune import tune as measure

        measure(output, console.say, chosen, processes)
        return
    from kore.reproduce.run import run

    run(output, quick, console.say, chosen, processes)
