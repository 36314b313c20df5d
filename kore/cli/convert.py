"""``kore convert``: official checkpoints to adapters and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kore.cli import console

if TYPE_CHECKING:
    from kore.official.to_adapter import Converted


def convert(
    source: Annotated[Path, typer.Argument(help="An official KORE checkpoint, or an adapter directory.")],
    model: Annotated[Path, typer.Option("--model", "-m", help="The untouched base model, a directory.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the result.")],
    trained_a: Annotated[
        bool, typer.Option("--trained-a", help="To an adapter: A was trained too; the result has twice the rank.")
    ] = False,
    form: Annotated[
        str, typer.Option(help="To a checkpoint: lossless (W_res = W0), or paper (W_res = W0 - B0 A, rounded).")
    ] = "lossless",
    like: Annotated[
        Path | None, typer.Option(help="To a checkpoint: take names and settings from this official checkpoint.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="To an adapter: show what is left of every layer.")
    ] = False,
) -> None:
    """Turn an official checkpoint (ALinear, BLinear, weight_residual) into an adapter, or an adapter into one.

    What SOURCE is decides the direction. Only safetensors files are read and written, one layer at a time.

    Example: `kore convert runs/official/checkpoint -m models/llava -o runs/official/adapter`

    The other way: `kore convert runs/a/train/adapter -m models/llava -o runs/a/official --like runs/official/init`
    """
    from kore.errors import ConfigError

    if (source / "adapter_config.json").is_file():
        from kore.official.to_official import to_official

        if trained_a or verbose:
            raise ConfigError(
                f"{'--trained-a' if trained_a else '--verbose'}: only for an official checkpoint as SOURCE"
            )
        done = to_official(source, model, output, form=form, like=like, progress=console.interactive())
        console.say(f"official checkpoint: {done.output} (rank {done.rank}, {form})")
        return
    from kore.official.to_adapter import to_adapter

    if form != "lossless" or like is not None:
        raise ConfigError(f"{'--form' if like is None else '--like'}: only for an adapter as SOURCE")
    done = to_adapter(source, model, output, trained_a=trained_a, progress=console.interactive())
    _show_remainders(done, verbose)
    projector = ", with the trained projector" if done.projector else ""
    console.say(f"adapter: {done.output} (rank {done.rank}, {len(done.remainders)} layers{projector})")


def _show_remainders(done: Converted, verbose: bool) -> None:
    """What is left of W0 − W_res beside B₀A, by kind of layer or for every layer, in units of rounding."""
    from statistics import median

    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    rows: dict[str, list[float]] = {}
    for layer, remainder in done.remainders.items():
        rows.setdefault(layer if verbose else layer.rpartition(".")[2], []).append(remainder)
    table = Table(box=SIMPLE_HEAD, caption="left of W0 - W_res beside B0 A; 1 is the most that rounding explains")
    table.add_column("layer")
    for column in ("count", "median", "largest"):
        table.add_column(column, justify="right")
    for layer, values in rows.items():
        table.add_row(layer, str(len(values)), f"{median(values):.3f}", f"{max(values):.3f}")
    console.show(table)
