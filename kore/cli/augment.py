"""``kore augment``: conversations from pieces of knowledge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kore.cli import console

if TYPE_CHECKING:
    from kore.augmentation.forecast import Estimate
    from kore.augmentation.run import Summary


def _write_texts(folder: Path | None) -> None:
    """Copy the texts and stop, before anything else is asked for."""
    if folder is not None:
        from kore.augmentation.texts import write_texts

        written = write_texts(folder)
        console.say(f"{len(written)} files in {folder}; delete those that stay as they are")
        raise typer.Exit


def augment(
    knowledge: Annotated[
        Path, typer.Argument(help="JSONL, JSON, CSV, TSV or Parquet file, or the directory of a saved dataset.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the result.")],
    generator: Annotated[
        str | None, typer.Option("--generator", "-g", help="rules (by default), openai or local.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The server's name for it; for local a directory or hub id.")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Of a server with the OpenAI interface, such as http://localhost:8000/v1.")
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(help="Where images are searched: none (by default), commons, google, serpapi, or a folder."),
    ] = None,
    allow: Annotated[
        list[str] | None, typer.Option(metavar="HOST", help="A host images may be downloaded from; repeatable.")
    ] = None,
    image_root: Annotated[
        Path | None, typer.Option(help="Folder of the knowledge's own images; by default that of the file.")
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="Folder with templates and prompts that replace the library's own.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Of dialogue,recognition,caption,vqa; by default all.")] = None,
    general: Annotated[
        str | None,
        typer.Option(
            help="In place of the tasks, for comparison: text-aware, text-agnostic, image-aware or image-agnostic."
        ),
    ] = None,
    export: Annotated[
        str | None, typer.Option(help="Beside LLaVA's format: sharegpt,openai,plain, separated by commas.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Items worked on at a time.")] = None,
    max_items: Annotated[int | None, typer.Option(help="Only the first so many items.")] = None,
    on_bad_row: Annotated[str | None, typer.Option(help="What to do with a bad row: fail or skip.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Where answers and images are kept between runs; by default OUT/cache.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it would ask for and cost; nothing is asked or written.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    set: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting; repeatable.")
    ] = None,
    write_texts: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            is_eager=True,
            callback=_write_texts,
            help="Only copy the templates and prompts to DIR, to be edited and given as --texts.",
        ),
    ] = None,
) -> None:
    """Make dialogues, recognition, captions and visual questions from pieces of knowledge.

    A row of KNOWLEDGE has `type`, `title` (news) or `name` (entity), `text`, and may have `id`, `image` and `facts`.
    Stopped and started again, it goes on where it was and asks nothing twice. Keys come from the environment only.

    Example: `kore augment knowledge.jsonl -o augmented && kore train -d augmented/llava.json -m MODEL -a INIT -o out`

    With a server: `kore augment knowledge.jsonl -o augmented -g openai -m qwen3 --base-url http://localhost:8000/v1
    --images commons --set images.contact=you@example.org --set generator.price_input=0.15
    --set generator.price_output=0.6 --dry-run`
    """
    from kore.augmentation.config import AugmentConfig
    from kore.pipeline.loading import parse_options

    values: dict[str, Any] = {
        "generator": _given(kind=generator, model=model, base_url=base_url),
        "images": {**_source(images), **_given(allow=allow)},
        "seed": seed,
        **_given(
            image_root=image_root,
            texts=texts,
            tasks=tasks,
            general=general,
            export=export,
            workers=workers,
            max_items=max_items,
            on_bad_row=on_bad_row,
        ),
    }
    if generator is None and (model or base_url):
        values["generator"]["kind"] = "openai"
    config = parse_options(AugmentConfig, values, set or [])
    if dry_run:
        from kore.augmentation.forecast import estimate

        _show_estimate(estimate(knowledge, config, out / "cache" if cache is None else cache))
        return
    from kore.augmentation.run import augment as run

    summary = run(knowledge, config, out, progress=console.interactive(), cache=cache)
    show_summary(summary)
    console.say(f"result: {summary.data}")
    if summary.quality is not None:
        console.say(f"report: {summary.quality}")


def _source(images: str | None) -> dict[str, Any]:
    """A kind of source, or a folder."""
    if images is None:
        return {}
    if images in ("none", "commons", "google", "serpapi"):
        return {"kind": images}
    return {"kind": "folder", "path": images}


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def show_summary(summary: Summary) -> None:
    """Print what a run made and what it took."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from kore.augmentation.export import FAILURES
    from kore.pipeline.stage import counted, duration

    table = Table(box=SIMPLE_HEAD)
    table.add_column("task")
    for column in ("conversations", "questions", "failures"):
        table.add_column(column, justify="right")
    failed: dict[str, int] = {}
    for (task, _), count in summary.failures.items():
        failed[task] = failed.get(task, 0) + count
    for task in dict.fromkeys([*summary.samples, *failed]):
        made = (summary.samples.get(task, 0), summary.turns.get(task, 0), failed.get(task, 0))
        table.add_row(task, *(f"{count:,}" for count in made))
    console.show(table)
    spent = summary.accounting
    rate = f", {summary.items / summary.seconds:.1f} items/s" if summary.seconds >= 1 else ""
    done_before = f" ({summary.kept:,} of them done before)" if summary.kept else ""
    items, images = counted(summary.items, "item"), counted(summary.images, "image")
    console.say(f"{items}{done_before}, {images} in {duration(summary.seconds)}{rate}")
    if spent["prompt_tokens"] or spent["cached"]:
        tokens = f"{counted(spent['prompt_tokens'], 'token')} asked, {spent['completion_tokens']:,} answered"
        cost = f", cost {spent['cost']:.4f}" if spent["cost"] else ""
        requests, cached = counted(spent["requests"], "request"), counted(spent["cached"], "answer")
        console.say(f"{requests}, {cached} from the cache, {tokens}{cost}")
    for (task, reason), count in sorted(summary.failures.items(), key=lambda entry: -entry[1])[:8]:
        console.say(f"failed: {count:,} × {task}: {reason}")
    if summary.bad_rows:
        console.say(f"left out: {counted(summary.bad_rows, 'bad row')}")
    if summary.failures or summary.bad_rows:
        console.say(f"all failures: {summary.out / FAILURES}")
    if summary.passing:
        console.say(f"{counted(summary.passing, 'failure')} may pass: the same command tries these items again")
    if summary.image_problems:
        images = counted(summary.image_problems, "image")
        console.say(f"{images} could not be had; {summary.out / 'run.json'} says why")


def _show_estimate(found: Estimate) -> None:
    from kore.pipeline.stage import counted

    console.say(f"{counted(found.items, 'item')}, {found.done:,} of them done; nothing was asked or written")
    console.say(f"requests: {found.requests:,}, of which the cache answers {found.cached:,}")
    console.say(f"tokens: about {found.prompt_tokens:,} asked and {found.completion_tokens:,} answered")
    searches = f"{found.searches:,} search" + ("" if found.searches == 1 else "es")
    console.say(f"images: up to {searches} and {counted(found.downloads, 'download')}")
    cost = (
        "unknown; set generator.price_input and generator.price_output" if found.cost is None else f"{found.cost:.2f}"
    )
    console.say(f"cost: {cost}")
    for note in found.notes:
        console.say(f"note: {note}")
