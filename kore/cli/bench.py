"""``kore bench``: measure the kernels on this machine."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kore.cli import console

if TYPE_CHECKING:
    import torch

bench = typer.Typer(
    help="Measure the kernels on this machine, beside what they replace.\n\nExample: `kore bench covariance --quick`",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Picture = Annotated[Path | None, typer.Option("--output", "-o", help="Write the picture to this PNG file.")]
Numbers = Annotated[Path | None, typer.Option("--json", help="Write every number to this JSON file.")]
Backend = Annotated[str | None, typer.Option(help="auto, native, triton, torch or reference.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; by default as many as torch takes.")]
Rounds = Annotated[int | None, typer.Option(min=1, help="Times each contender runs in a case.")]
Quick = Annotated[bool, typer.Option("--quick", help="Small sizes and few rounds: a few seconds.")]


def covariance(
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of x, separated by commas: float32, bfloat16, float16.")] = (
        "float32,bfloat16"
    ),
    d: Annotated[str | None, typer.Option("--d", help="Values of d, separated by commas.")] = None,
    n: Annotated[str | None, typer.Option("--n", help="Values of N, the rows of x, separated by commas.")] = None,
    output: Picture = None,
    json: Numbers = None,
    backend: Backend = None,
    threads: Threads = None,
    rounds: Rounds = None,
    quick: Quick = False,
) -> None:
    """Time `covariance_update_` beside its peers, against the roofline measured on this machine.

    Every contender is checked against float64 before it is timed; contenders take turns.

    Example: `kore bench covariance --d 1024,4096 --n 600,2048 -o covariance.png`
    """
    from kore.bench import show
    from kore.bench.covariance import Plan, run
    from kore.bench.machine import resolve_device

    place = resolve_device(device)
    large = place.type == "cuda" and not quick
    plan = Plan(
        dims=_numbers("--d", d) or ((1024, 4096, 11008) if large else (128, 256) if quick else (1024, 4096)),
        tokens=_numbers("--n", n) or ((64, 600, 2048, 8192) if large else (32, 256) if quick else (64, 600, 2048)),
        dtypes=_dtypes(dtype),
        rounds=rounds or (3 if quick else 9),
        quick=quick,
    )
    total = len(plan.dims) * len(plan.tokens) * len(plan.dtypes)
    result = _measured(lambda say: run(plan, place, say), total, place, backend, threads, (output, json))
    _present(result, show, output, json)


def lora(
    device: Device = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16, separated by commas. CPU: float32, GPU: bfloat16.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="d_in:d_out, separated by commas; layers that read one input as d_in:d_out+d_out."),
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Numbers of tokens, separated by commas.")] = None,
    ranks: Annotated[str | None, typer.Option(help="Ranks of the update, separated by commas.")] = None,
    output: Picture = None,
    json: Numbers = None,
    backend: Backend = None,
    threads: Threads = None,
    rounds: Rounds = None,
    quick: Quick = False,
) -> None:
    """Time frozen-A LoRA layers beside their peers: forward, backward, what is kept, and the flop floor.

    Every contender is checked against float64 before it is timed; contenders take turns.

    Example: `kore bench lora --layers 4096:4096,4096:11008+11008 --tokens 2048 --ranks 64,235 -o lora.png`
    """
    from kore.bench import show_lora
    from kore.bench.lora import Plan, run
    from kore.bench.machine import resolve_device

    place = resolve_device(device)
    large = place.type == "cuda" and not quick
    small = "96:64,96:64+64" if quick else "2048:2048,2048:5504"
    plan = Plan(
        shapes=_shapes(layers or ("4096:4096,4096:11008,11008:4096" if large else small)),
        tokens=_numbers("--tokens", tokens) or ((4096, 8192, 16384) if large else (64,) if quick else (1024,)),
        ranks=_numbers("--ranks", ranks) or ((64, 128, 235, 240, 256, 274) if large else (10,) if quick else (235,)),
        dtypes=_dtypes(dtype or ("bfloat16" if place.type == "cuda" else "float32")),
        rounds=rounds or (3 if quick else 9),
    )
    total = len(plan.cases())
    result = _measured(lambda say: run(plan, place, say), total, place, backend, threads, (output, json))
    _present(result, show_lora, output, json)


def step(
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto (CPU: float32, GPU: bfloat16), float32, ...")] = "auto",
    shape: Annotated[
        str | None, typer.Option(help="Decoder layers, width, inner width, heads and vocabulary, separated by commas.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Of the one text that every step reads.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of the updates with a frozen A.")] = None,
    lora_rank: Annotated[int | None, typer.Option(min=1, help="Of PEFT's LoRA with a trained A.")] = None,
    json: Numbers = None,
    backend: Backend = None,
    threads: Threads = None,
    rounds: Rounds = None,
    quick: Quick = False,
) -> None:
    """Time whole training steps of a decoder stack: frozen, PEFT, accelerated, merged and official.

    Loss and gradients of every model are checked against float64 first; models take turns.

    Example: `kore bench step --shape 4,1024,2752,16,2048 --tokens 1024 --rank 64`
    """
    from kore.bench import show_step
    from kore.bench.machine import DTYPES, resolve_device
    from kore.bench.step import Plan, run
    from kore.bench.step_peers import LlamaShape
    from kore.errors import KoreError

    place = resolve_device(device)
    large, usual = place.type == "cuda" and not quick, "bfloat16" if place.type == "cuda" else "float32"
    default = "4,4096,11008,32,32000" if large else "2,64,176,4,128" if quick else "2,1024,2752,16,2048"
    sizes = _numbers("--shape", shape or default)
    if len(sizes) != 5 or sizes[1] % (2 * sizes[3]):
        raise KoreError(f"--shape: expected layers,width,inner,heads,vocabulary, width / heads even, got {shape!r}")
    plan = Plan(
        shape=LlamaShape(*sizes),
        tokens=tokens or (8192 if large else 32 if quick else 512),
        rank=rank or (12 if quick else 235),
        lora_rank=lora_rank or (8 if quick else 128),
        dtype=DTYPES[_one_of("--dtype", usual if dtype == "auto" else dtype, tuple(DTYPES))],
        rounds=rounds or (3 if quick else 9),
    )
    if max(plan.rank, plan.lora_rank) > min(plan.shape.width, plan.shape.inner):
        raise KoreError(f"--rank: expected at most the width {plan.shape.width}, got {plan.rank} and {plan.lora_rank}")
    result = _measured(lambda say: run(plan, place, say), 8, place, backend, threads, (json,))
    _present(result, show_step, None, json)


def init(
    device: Device = "auto",
    case: Annotated[
        str, typer.Option(help="layer; covariance, one alone; or model, a small LLaVA with its capture.")
    ] = "layer",
    width: Annotated[int | None, typer.Option(min=8, help="d of the layer.")] = None,
    inner: Annotated[int | None, typer.Option(min=8, help="d_in of down_proj.")] = None,
    rank: Annotated[int | None, typer.Option(min=1)] = None,
    json: Numbers = None,
    threads: Threads = None,
    rounds: Rounds = None,
    quick: Quick = False,
) -> None:
    """Time the adapter factors of a decoder layer beside the published recipe's full decompositions.

    Null spaces are checked against float64 first: energy at most 1.02 of the smallest possible, or that of the recipe.

    Example: `kore bench init --width 4096 --inner 11008 --rank 235 --rounds 1`

    One covariance alone: `kore bench init --case covariance --width 4096 --rank 235`
    """
    from kore.bench import show_init
    from kore.bench.init import Plan, run
    from kore.bench.init_cases import CovariancePlan, ModelPlan, run_covariance, run_model
    from kore.bench.llava import SMALL, TINY
    from kore.bench.machine import resolve_device
    from kore.errors import KoreError

    place = resolve_device(device)
    large = place.type == "cuda" and not quick
    if _one_of("--case", case, ("layer", "covariance", "model")) == "model":
        if width is not None or inner is not None:
            raise KoreError("--width, --inner: the model of --case model has its own; leave them out")
        shape = TINY if quick else SMALL
        width, inner = shape.width, shape.inner
    width = width or (4096 if large else 96 if quick else 1024)
    inner = inner or (11008 if large else 160 if quick else 2752)
    rank, rounds = rank or (235 if large else 12 if quick else 64), rounds or 3
    narrowest = width if case == "covariance" else min(width, inner)
    if rank > narrowest:
        raise KoreError(f"--rank: expected at most d = {narrowest}, got {rank}")
    measure: Callable[[Callable[[str], None]], dict[str, Any]]
    if case == "layer":
        plan, total = Plan(width, inner, rank, rounds), 3 * (rounds + 1)
        measure = lambda say: run(plan, place, say)  # noqa: E731
    elif case == "covariance":
        alone, total = CovariancePlan(width, rank, rounds), 4 * rounds
        measure = lambda say: run_covariance(alone, place, say)  # noqa: E731
    else:
        whole, total = ModelPlan(shape, 2 if quick else 6, rank, rounds), 2 * rounds
        measure = lambda say: run_model(whole, place, say)  # noqa: E731
    _present(_measured(measure, total, place, None, threads, (json,)), show_init, None, json)


def _measured(
    run: Callable[[Callable[[Any], None]], dict[str, Any]],
    total: int,
    place: torch.device,
    backend: str | None,
    threads: int | None,
    targets: tuple[Path | None, ...],
) -> dict[str, Any]:
    """The result of ``run``, with a bar that counts its cases. Files can be written afterwards: their folders exist."""
    from tqdm import tqdm

    from kore.bench.machine import settings
    from kore_kernels.dispatch import BACKENDS

    if backend is not None:
        _one_of("--backend", backend, ("auto", *BACKENDS))
    for target in targets:
        if target is not None:
            target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with settings(place, backend, threads), tqdm(total=total, unit="case", disable=not console.interactive()) as bar:
        return run(lambda case: bar.update())


def _present(result: dict[str, Any], how: ModuleType, output: Path | None, json: Path | None) -> None:
    from kore.bench.show import write_json

    console.show(how.table(result))
    for line in how.notes(result):
        console.say(line)
    if output is not None:
        how.figure(result).savefig(output, format="png", dpi=150)
        console.say(f"picture: {output}")
    if json is not None:
        write_json(json, result)
        console.say(f"numbers: {json}")


def _dtypes(text: str) -> list[torch.dtype]:
    from kore.bench.machine import DTYPES

    return [DTYPES[_one_of("--dtype", name.strip(), tuple(DTYPES))] for name in text.split(",")]


def _shapes(text: str) -> list[tuple[int, tuple[int, ...]]]:
    from kore.errors import KoreError

    shapes = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*([1-9]\d*):([1-9]\d*(?:\+[1-9]\d*)*)\s*", word)
        if match is None:
            raise KoreError(f"--layers: expected d_in:d_out or d_in:d_out+d_out, separated by commas, got {text!r}")
        shapes.append((int(match[1]), tuple(int(size) for size in match[2].split("+"))))
    return shapes


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
bench.command("lora")(console.interruptible(lora))
bench.command("init")(console.interruptible(init))
bench.command("step")(console.interruptible(step))
