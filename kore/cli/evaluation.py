"""``kore eval``: ask questions, or compare what earlier calls have answered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kore.cli import console
from kore.cli.stages import Device, Dtype, ImageRoot, OnBadRow, _absolute, _given, _model, _options, _run
from kore.errors import ConfigError

_PAGE = "report.html"


def evaluate(
    directories: Annotated[
        list[str] | None,
        typer.Argument(metavar="[[NAME=]DIR]...", help="With --compare: results; those of one name are its seeds."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory for the result; with --compare the page.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Model directory, or a hub id (owner/name).")
    ] = None,
    questions: Annotated[
        list[Path] | None,
        typer.Option("--questions", "-q", help="File of questions on new knowledge, for K.A; may be repeated."),
    ] = None,
    old: Annotated[
        list[Path] | None, typer.Option(help="File of questions on old knowledge, for K.R; may be repeated.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", "-a", help="A trained adapter.")] = None,
    image_root: ImageRoot = None,
    batch_size: Annotated[int, typer.Option(help="Questions answered at a time in each process.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 32,
    cem: Annotated[str | None, typer.Option(help="How CEM compares texts: vqa (by default), squad or evoke.")] = None,
    f1: Annotated[str | None, typer.Option(help="F1 over a multiset (by default) or a set of words.")] = None,
    on_bad_row: OnBadRow = "fail",
    dtype: Dtype = "auto",
    device: Device = "auto",
    answers: Annotated[
        list[Path] | None,
        typer.Option(help="In place of --model: file of answers {question_id, prediction}; may be repeated."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare finished results with the first of them.")
    ] = False,
    untouched: Annotated[
        list[Path] | None, typer.Option(help="With --compare: result of the untouched model, for HARS.")
    ] = None,
    shared: Annotated[
        bool, typer.Option("--shared", help="With --compare: only the questions all were asked.")
    ] = False,
) -> None:
    """Ask questions and mark the answers with CEM and F1, by question type and with intervals; or compare results.

    Stopped and started again it asks nothing twice. Another --cem or --f1 only marks the answers anew.

    Example: `kore eval -m models/llava -a runs/a/train/adapter -q new.jsonl --old old.jsonl -o runs/a/eval`

    Several processes, each with its share: `torchrun --nproc-per-node 4 -m kore eval ...`

    Answers that something else has given: `kore eval --answers theirs.jsonl -q new.jsonl --old old.jsonl -o theirs`

    Comparison with significance: `kore eval --compare lora=runs/l/eval kore=runs/k/eval -o compare/report.html`
    """
    if compare:
        for name, value in (
            ("--model", model),
            ("--questions", questions),
            ("--old", old),
            ("--adapter", adapter),
            ("--answers", answers),
        ):
            if value:
                raise ConfigError(f"{name}: not with --compare, which asks nothing; give the directories of results")
        _compare(directories or [], output, untouched or [], shared, cem, f1)
        return
    for option, given in (("--untouched", untouched), ("--shared", shared), ("directories", directories)):
        if given:
            raise ConfigError(f"{option}: expected --compare with it")
    if (model is None) == (not answers) or output is None or not (questions or old):
        raise ConfigError(
            "expected --model or --answers, --output, and --questions or --old; or --compare with directories"
        )
    settings = {
        "new": [{"file": file, "image_root": image_root} for file in questions or []],
        "old": [{"file": file, "image_root": image_root} for file in old or []],
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "on_bad_row": on_bad_row,
        **_given(cem=cem, f1=f1),
    }
    if model is not None:
        _ask(output, _model(model, dtype, device), settings, adapter)
    elif adapter is not None:
        raise ConfigError("--adapter: expected --model with it; --answers are there already")
    else:
        _mark(output, settings, answers or [])


def _mark(output: Path, settings: dict[str, Any], answers: Sequence[Path]) -> None:
    """Mark answers that are there; the result is laid out like that of a model."""
    from pydantic import ConfigDict, create_model

    from kore.data import load_questions
    from kore.evaluation import Measures
    from kore.evaluation.given import mark, read_predictions, store
    from kore.evaluation.summary import Run
    from kore.pipeline.config import EvalSection
    from kore.pipeline.loading import parse_options

    root: Any = create_model("Options", __config__=ConfigDict(extra="forbid"), eval=(EvalSection, ...))
    section: EvalSection = parse_options(root, {"eval": settings}).eval
    predictions, measures = read_predictions(answers), Measures(section.cem, section.f1)
    results: dict[str, dict[str, Any]] = {"new": {}, "old": {}}
    for group, sets in (("new", section.new), ("old", section.old)):
        for one in sets:
            questions = load_questions(one.file, one.image_root, section.on_bad_row)
            results[group][one.name] = mark(questions, predictions, measures, section.on_bad_row)
    output = output.absolute()
    store(Run(**results), output, measures)
    _report(output)


def _ask(output: Path, model: dict[str, Any], settings: dict[str, Any], adapter: Path | None) -> None:
    from kore.pipeline.config import EvalSection
    from kore.pipeline.stages import EvalStage
    from kore.processes import is_main_process

    options = _options({"eval": EvalSection}, {**model, "eval": settings}, None)
    stage = EvalStage(output.absolute(), options.model, options.eval, _absolute(adapter))
    _run(stage, options.model)
    if is_main_process():
        _report(stage.output)


def _report(output: Path) -> None:
    """The scores on the terminal and as a page beside them."""
    from kore.artifacts import read_json
    from kore.evaluation.comparing import compare as compared_with
    from kore.evaluation.comparison_page import write_page

    _show_scores(read_json(output / "scores.json"))
    write_page(compared_with({output.name: [output]}), output / _PAGE)


def _compare(
    directories: Sequence[str],
    output: Path | None,
    untouched: Sequence[Path],
    shared: bool,
    cem: str | None,
    f1: str | None,
) -> None:
    from kore.evaluation.comparing import compare as compared_with
    from kore.evaluation.comparison_page import write_comparison
    from kore.evaluation.measures import Measures
    from kore.evaluation.summary import load_run

    if not directories or output is None:
        raise ConfigError("--compare: expected directories of results, and --output for the page")
    contenders = _named(directories)
    page = output if output.suffix == ".html" else output / _PAGE
    measures = None
    if cem or f1:
        own = next(result for _, _, result in load_run(next(iter(contenders.values()))[0]).sets()).measures  # type: ignore[union-attr]
        measures = Measures(cem or own.cem, f1 or own.f1)  # type: ignore[arg-type]
    compared = compared_with(contenders, untouched, shared=shared, measures=measures)
    written = write_comparison(compared, page)
    _show_comparison(compared)
    console.say(f"report: {written}")


def _named(directories: Sequence[str]) -> dict[str, list[Path]]:
    """Directories by name; those without one are called after what tells their paths apart."""
    from kore.evaluation.comparing import names_for

    pairs = [_pair(word) for word in directories]
    plain = [path for name, path in pairs if name is None]
    own = iter(names_for(plain)) if plain else iter(())
    contenders: dict[str, list[Path]] = {}
    for name, path in pairs:
        contenders.setdefault(name or next(own), []).append(path)
    paths = [path.absolute() for _, path in pairs]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise ConfigError(f"--compare: {twice} is given twice")
    return contenders


def _pair(word: str) -> tuple[str | None, Path]:
    name, equals, path = word.partition("=")
    if not equals or Path(word).exists():
        return None, Path(word)
    if not name or not path:
        raise ConfigError(f"--compare: expected DIR or NAME=DIR, got {word!r}")
    return name, Path(path)


def _show_scores(scores: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for column in ("questions", "type"):
        table.add_column(column)
    for column in ("count", "CEM", "F1", "mean, 95 %"):
        table.add_column(column, justify="right")
    for group in ("new", "old"):
        for name, result in scores[group].items():
            rows = {"all": result["overall"], **(result["by_type"] if len(result["by_type"]) > 1 else {})}
            for kind, score in rows.items():
                low, high = score["intervals"]["mean"]
                mean = f"{score['mean']:.2f} [{low:.1f}, {high:.1f}]"
                cells = (str(score["count"]), f"{score['cem']:.2f}", f"{score['f1']:.2f}", mean)
                table.add_row(name, kind, *cells)
    console.show(table)
    for key, label in (("ka", "K.A"), ("kr", "K.R")):
        if scores[key] is not None:
            low, high = scores["intervals"][key]
            console.say(f"{label} {scores[key]:.2f}" + ("" if low is None else f"   95 %: {low:.2f} to {high:.2f}"))


def _show_comparison(compared: Any) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    table.add_column("")
    for measure in next(iter(compared.summary.values())):
        table.add_column(measure, justify="right")
    for name, found in compared.summary.items():
        table.add_row(name, *(f"{one:.2f}" for one in found.values()))
    for name, found in compared.against.items():
        cells = [f"{one.interval:+.2f}" + ("" if one.p is None else f" p {one.p:.2g}") for one in found.values()]
        table.add_row(f"{name} − {compared.reference}", *cells)
    console.show(table)
