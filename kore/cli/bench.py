"""``kore bench``: measure the kernels on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kore.cli import console

bench = typer.Typer(
    help="Measure the kernels on this machine, beside what they replace.\n\nExample: `kore bench covariance --quick`",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


def covariance(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of x, separated by commas: float32, bfloat16, float16.")] = (
        "float32,bfloat16"
    ),
    d: Annotated[str | None, typer.Option("--d", help="Values of d, separated by commas.")] = None,
    n: Annotated[str | None, typer.Option("--n", help="Values of N, the rows of x, separated by commas.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the picture to this PNG file.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write every number to this JSON file.")] = None,
    backend: Annotated[str | None, typer.Option(help="auto, native, triton or reference.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default as many as torch takes.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Times each contender runs in a case.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes and few rounds: a few seconds.")] = False,
) -> None:
    """Time `covariance_update_` beside its peers, against the roofline measured on this machine.

    Every contender is checked against float64 before it is timed; contenders take turns.

    Example: `kore bench covariance --d 1024,4096 --n 600,2048 -o covariance.png`
    """
    from tqdm import tqdm

    from kore.bench import show
    from kore.bench.covariance import Plan, run
    from kore.bench.machine import DTYPES, resolve_device, settings

    place = resolve_device(device)
    large = place.type == "cuda" and not quick
    plan = Plan(
        dims=_numbers("--d", d) or ((1024, 4096, 11008) if large else (128, 256) if quick else (1024, 4096)),
        tokens=_numbers("--n", n) or ((64, 600, 2048, 8192) if large else (32, 256) if quick else (64, 600, 2048)),
        dtypes=[DTYPES[_one_of("--dtype", name.strip(), tuple(DTYPES))] for name in dtype.split(",")],
        rounds=rounds or (3 if quick else 9),
        quick=quick,
    )
    if backend is not None:
        _one_of("--backend", backend, ("auto", "native", "triton", "reference"))
    for target in (output, json):
        if target is not None:
            target.absolute().parent.mkdir(parents=True, exist_ok=True)
    total = len(plan.dims) * len(plan.tokens) * len(plan.dtypes)
    with settings(place, backend, threads), tqdm(total=total, unit="case", disable=not console.interactive()) as bar:
        result = run(plan, place, lambda case: bar.update())
    console.show(show.table(result))
    for line in show.notes(result):
        console.say(line)
    if output is not None:
        show.figure(result).savefig(output, format="png", dpi=150)
        console.say(f"picture: {output}")
    if json is not None:
        show.write_json(json, result)
        console.say(f"numbers: {json}")


def _numbers(option: str, text: str | None) -> tuple[int, ...]:
    from kore.errors import KoreError

    if text is None:
        return ()
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise KoreError(f"{option}: expected whole numbers above 0, separated by commas, got {text!r}")
    return tuple(int(word) for word in words)


def _one_of(option: str, word: str, allowed: tuple[str, ...]) -> str:
    from kore.errors import KoreError

    if word not in allowed:
        raise KoreError(f"{option}: expected {', '.join(allowed)}, got {word!r}")
    return word


bench.command("covariance")(console.interruptible(covariance))
