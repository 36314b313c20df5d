"""``kore retention``: what a model has kept, by the benchmarks of K.R and by local sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kore.cli import console
from kore.errors import ConfigError

if TYPE_CHECKING:
    from kore.retention.run import Plan, Retention


def retention(
    model: Annotated[
        list[str], typer.Option("--model", "-m", metavar="[NAME=]MODEL", help="Model directory or hub id; repeatable.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the result.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", metavar="[NAME=]DIR", help="A trained adapter of the model; repeatable."),
    ] = None,
    benchmarks: Annotated[
        str | None, typer.Option("--benchmarks", "-b", help="all, or some: mme,pope; all unless --suite is given.")
    ] = None,
    suite: Annotated[
        list[Path] | None, typer.Option(help="File of a local set, which needs no engine; repeatable.")
    ] = None,
    image_root: Annotated[
        Path | None, typer.Option(help="Folder of the sets' images; by default that of each.")
    ] = None,
    data_root: Annotated[
        Path | None,
        typer.Option(help="Where data sets lie: DIR/OWNER/NAME as the hub has them, DIR/LMUData for VLMEvalKit."),
    ] = None,
    hub: Annotated[bool, typer.Option("--hub", help="Let the engines download data that are missing.")] = False,
    lmms_python: Annotated[
        str | None, typer.Option(help="Interpreter that has lmms-eval; by default this one.", envvar="KORE_LMMS_PYTHON")
    ] = None,
    vlmevalkit: Annotated[
        Path | None, typer.Option(help="Checkout of VLMEvalKit, for OCRVQA and MMDU.", envvar="KORE_VLMEVALKIT")
    ] = None,
    vlmevalkit_python: Annotated[
        str | None, typer.Option(help="Interpreter that has its packages.", envvar="KORE_VLMEVALKIT_PYTHON")
    ] = None,
    vlmevalkit_for: Annotated[
        str | None, typer.Option(help="Benchmarks it runs in place of lmms-eval: all, or some, such as pope,mme.")
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(help="Judge in place of each task's own; its key is OPENAI_API_KEY.")
    ] = None,
    judge_url: Annotated[
        str | None,
        typer.Option(help="Server of the judge with the OpenAI interface, such as http://localhost:8000/v1."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered at a time.", min=1)] = 8,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer; by default what each benchmark says.", min=1)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first so many questions of a benchmark, for a trial.", min=1)
    ] = None,
    time_limit: Annotated[float | None, typer.Option(help="Hours for one benchmark.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say, for each benchmark, what is missing; nothing is run.")
    ] = False,
) -> None:
    """Run the twelve benchmarks of K.R through lmms-eval and VLMEvalKit, and local sets, for one model or several.

    What cannot be run is named with what it needs, and the rest goes on. Stopped and started again it keeps finished
    scores and asks nothing twice. Several adapters of one model, or several models, are put side by side.

    Example: `kore retention -m models/llava -a runs/a/train/adapter -o runs/a/retention --data-root data --dry-run`

    Local sets only: `kore retention -m models/llava --suite signs.jsonl --suite animals.jsonl -o runs/a/suite`
    """
    from kore.processes import process_count

    if process_count() > 1:
        raise ConfigError("kore retention: expected one process; it starts those of the engines itself")
    settings = _settings(
        data_root=data_root, hub=hub, batch_size=batch_size, max_new_tokens=max_new_tokens, limit=limit,
        judge_model=judge_model, judge_url=judge_url, time_limit=None if time_limit is None else 3600 * time_limit,
    )  # fmt: skip
    contenders = _contenders(model, adapter or [], dtype, device)
    chosen = _chosen(
        benchmarks if benchmarks is not None or suite else "all",
        vlmevalkit_for, settings, lmms_python, vlmevalkit, vlmevalkit_python,
    )  # fmt: skip
    sets = _sets(suite or [], image_root)
    from kore.retention.run import plan, run_retention

    if dry_run:
        _show_plan(plan(chosen), sets)
        return
    from kore.pipeline.stage import only_one

    found: dict[str, Retention] = {}
    for name, asked in contenders.items():
        place = output.absolute() if len(contenders) == 1 else output.absolute() / name
        if len(contenders) > 1:
            console.say(f"{name}:")
        with only_one(place):
            found[name] = run_retention(
                asked, place, chosen, suite=sets, batch_size=batch_size, max_new_tokens=max_new_tokens or 64,
                say=_told, progress=console.interactive(),
            )  # fmt: skip
    show_retention(found)
    console.say(f"result: {output}")


def _told(name: str, state: str, remark: str) -> None:
    console.stage(f"{name:<16}", state, remark)


def _settings(**values: Any) -> Any:
    from kore.retention.engines.base import Settings

    root = values["data_root"]
    if root is not None and not root.is_dir():
        raise ConfigError(f"--data-root: no such directory: {root}")
    values["data_root"] = None if root is None else root.absolute()
    return Settings(**values)


def _contenders(models: Sequence[str], adapters: Sequence[str], dtype: str, device: str) -> dict[str, Any]:
    """By name what is asked: each model, each adapter of the one model, or pairs where there are as many of both."""
    from kore.evaluation.comparing import names_for
    from kore.retention.engines.base import Asked

    if adapters and len(models) not in (1, len(adapters)):
        raise ConfigError(
            f"--adapter: expected one model, or as many as adapters; got {len(models)} and {len(adapters)}"
        )
    named_models = [_named(one) for one in models]
    named_adapters = [_named(one) for one in adapters]
    for _, path in named_adapters:
        if not Path(path).is_dir():
            raise ConfigError(f"--adapter: no such directory: {path}")
    for _, path in named_models:
        if not Path(path).is_dir() and (
            Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") != 1
        ):
            raise ConfigError(f"--model: no such model directory: {path} (a hub id has the form owner/name)")
    deciding = named_adapters or named_models
    short = iter(names_for([Path(path) for name, path in deciding if name is None] or [Path()]))
    contenders: dict[str, Any] = {}
    for number, (name, path) in enumerate(deciding):
        base = named_models[number if len(named_models) > 1 else 0][1]
        base = str(Path(base).absolute()) if Path(base).is_dir() else base
        own = (name or next(short)).replace("/", "-")
        if own in contenders:
            raise ConfigError(f"--model, --adapter: two are called {own!r}; give each a name: NAME=DIR")
        contenders[own] = Asked(base, Path(path).absolute() if named_adapters else None, dtype, device)
    return contenders


def _named(word: str) -> tuple[str | None, str]:
    name, equals, path = word.partition("=")
    if not equals or Path(word).exists() or "/" in name:
        return None, word
    if not name or not path:
        raise ConfigError(f"expected PATH or NAME=PATH, got {word!r}")
    return name, path


def _chosen(
    names: str | None,
    vlmevalkit_for: str | None,
    settings: Any,
    lmms_python: str | None,
    checkout: Path | None,
    vlmevalkit_python: str | None,
) -> list[Any]:
    from kore.retention.benchmarks import select
    from kore.retention.engines.lmms_eval import LmmsEval
    from kore.retention.engines.vlmevalkit import VlmEvalKit
    from kore.retention.run import choose_engines

    if names is None:
        return []
    named = [] if vlmevalkit_for is None else [one.name for one in select(vlmevalkit_for.split(","))]
    engines = LmmsEval(settings, lmms_python), VlmEvalKit(settings, checkout, vlmevalkit_python)
    return choose_engines(select(names.split(",")), *engines, named)


def _sets(files: Sequence[Path], image_root: Path | None) -> list[Any]:
    from kore.retention.offline import load_suite

    return load_suite(files, image_root) if files else []


def _show_plan(plans: Sequence[Plan], sets: Sequence[Any]) -> None:
    for one in plans:
        task = one.benchmark.task(one.engine.name)
        assert task is not None
        what = f"{one.engine.name}, {task.name}"
        if not one.problems:
            console.check(one.benchmark.name, "ok", f"{what}: ready")
        for problem in one.problems:
            console.check(one.benchmark.name, "missing", f"{what} needs {problem}")
    for each in sets:
        console.check(each.name, "ok", f"local set, {each.kind}: {len(each.items)} questions")
    ready = sum(not one.problems for one in plans)
    if plans:
        console.say(f"{ready} of {len(plans)} benchmarks are ready; nothing was run")


def show_retention(found: dict[str, Retention]) -> None:
    """Print the scores of one model or of several side by side, and what is missing."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for column in ("dimension", "benchmark", "measured by"):
        table.add_column(column)
    for name in found:
        table.add_column(name if len(found) > 1 else "score", justify="right")
    first = next(iter(found.values()))
    for number, one in enumerate(first.outcomes):
        cells = [_score(each.outcomes[number].score) for each in found.values()]
        version = f" {one.version}" if one.version else ""
        table.add_row(one.dimension, one.name, f"{one.engine}{version}", *cells)
    for row, local in enumerate([] if first.suite is None else first.suite.sets):
        cells = [f"{each.suite.sets[row].interval:.2f}" for each in found.values() if each.suite is not None]
        table.add_row(local.dimension, local.name, f"local set, {local.score}", *cells)
    console.show(table)
    for name, each in found.items():
        before = f"{name}: " if len(found) > 1 else ""
        if each.outcomes:
            means = ", ".join(f"{dimension} {value:.2f}" for dimension, value in each.dimensions.items())
            console.say(f"{before}{each.label}: {_score(each.kr)}" + (f"   ({means})" if means else ""))
        if each.suite is not None:
            means = ", ".join(f"{dimension} {value:.2f}" for dimension, value in each.suite.dimensions.items())
            console.say(f"{before}local sets, mean with 95 %: {each.suite.kr:.2f}   ({means})")
        for outcome in each.outcomes:
            for remark in outcome.remarks:
                console.say(f"{before}{outcome.name}: {remark}")
            for reason in outcome.reasons:
                console.warning(f"{before}{outcome.name}: {'needs ' * (outcome.state == 'missing')}{reason}")


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
