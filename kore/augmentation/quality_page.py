"""The page of the quality report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kore.augmentation.quality import BINS, Quality, Shares, reference
from kore.augmentation.types import TASKS
from kore.report import Report

PICTURES = 24
ROWS = 25
_NAMES = {"dialogue": "dialogue", "recognition": "recognition", "caption": "caption", "vqa": "visual question"}


def write_page(path: Path, quality: Quality) -> Path:
    """Write the page atomically; returns its path."""
    numbers = quality.numbers()
    items = sum(numbers["items"].values())
    conversations = sum(numbers["samples"].values())
    report = Report("Quality of the augmentation", f"{items:,} items, {conversations:,} conversations")
    failed = sum(entry["count"] for entry in numbers["failures"])
    found = _pooled(quality.support.values())
    report.tiles(
        [
            ("items", f"{items:,}", ", ".join(f"{count:,} {name}" for name, count in numbers["items"].items())),
            ("conversations", f"{conversations:,}", f"{sum(numbers['turns'].values()):,} questions with answers"),
            ("answers found in the text", "–" if found is None else f"{found:.1%}", "mean share of content words"),
            ("different images", f"{numbers['different_images']:,}"),
            ("failures", f"{failed:,}", "each is in failures.jsonl" if failed else ""),
        ]
    )
    _counts(report, numbers, items)
    _lengths(report, numbers)
    _fidelity(report, quality, numbers)
    _images(report, quality, numbers)
    _failures(report, numbers)
    _examples(report, quality)
    return report.write(path)


def _counts(report: Report, numbers: dict[str, Any], items: int) -> None:
    report.section("What there is")
    rows = [
        [
            _NAMES[task],
            numbers["samples"][task],
            numbers["turns"][task],
            numbers["turns"][task] / items if items else None,
        ]
        for task in TASKS
    ]
    theirs = reference()
    report.table(
        ["task", "conversations", "questions", "questions per item"],
        rows,
        f"In the data set of the paper, KORE-74K, an item has {theirs['rounds']:.1f} rounds of dialogue and "
        f"{theirs['vqa']:.1f} visual questions, and there are {theirs['images']:.1f} different images per item.",
    )
    types = list(numbers["types"].items())
    rest = sum(count for _, count in types[ROWS:])
    rows = [[name, count, 100 * count / items] for name, count in types[:ROWS]]
    rows += [[f"{len(types) - ROWS} others", rest, 100 * rest / items]] if rest else []
    report.table(["type", "items", "%"], rows, digits=1)


def _lengths(report: Report, numbers: dict[str, Any]) -> None:
    report.section("Lengths")
    rows: list[list[Any]] = [["dialogue", "rounds", *_three(numbers["dialogue_rounds"])]]
    for task in TASKS:
        rows.append(
            [_NAMES[task], "words of a question, with its instruction", *_three(numbers["question_words"][task])]
        )
        rows.append([_NAMES[task], "words of an answer", *_three(numbers["answer_words"][task])])
    report.table(["task", "", "mean", "median", "largest"], [row for row in rows if row[2] is not None], digits=1)


def _three(numbers: dict[str, float] | None) -> list[float | None]:
    return [None] * 3 if numbers is None else [numbers["mean"], numbers["median"], numbers["largest"]]


def _fidelity(report: Report, quality: Quality, numbers: dict[str, Any]) -> None:
    report.section(
        "Answers and the text",
        "An answer's share is that of its content words and numbers that stand in title, type, text or facts of its "
        "item. It tells what was added, not whether what was said is right. The first round of a dialogue, which comes "
        "from a template, is left out; a caption's sentence that names what is depicted counts, with its own words.",
    )
    rows = []
    for task, found in numbers["answers_found_in_text"].items():
        if found is not None:
            rows.append([_NAMES[task], found["count"], 100 * found["mean"], 100 * found["whole"], 100 * found["least"]])
    report.table(["task", "answers", "mean share, %", "found whole, %", "least share, %"], rows, digits=1)
    report.facts(
        {
            "asked twice": f"{numbers['questions_repeated_within_item']:.2%} of the questions ask what an earlier one "
            "of the same item and image asks",
            "worded alike": f"{numbers['wordings_repeated_across_items']:.1%} of the questions have, names and numbers "
            "aside, the wording of one about another item",
        }
    )


def _images(report: Report, quality: Quality, numbers: dict[str, Any]) -> None:
    pictures = _distinct(quality)
    if not pictures:
        return
    report.section("Images")
    rows = []
    for task, found in numbers["similarity"].items():
        if found is not None:
            rows.append(
                [_NAMES[task], found["count"], found["mean"], found["least"], _spread(quality.similarity[task])]
            )
    if rows:
        report.table(
            ["task", "measured", "mean", "least", "middle half"], rows, "CLIP cosine similarity to the original image."
        )
    licences = list(numbers["licences"].items())
    report.table(["licence", "uses"], [list(entry) for entry in licences[:ROWS]])
    report.pictures(pictures)


def _distinct(quality: Quality) -> list[tuple[Path, str]]:
    chosen: dict[str, tuple[Path, str]] = {}
    for item, sample in quality.images:
        assert sample.image is not None
        measured = "" if sample.similarity is None else f", {sample.similarity:.2f}"
        caption = f"{item.title:.60} ({_NAMES[sample.task]}{measured})"
        chosen.setdefault(sample.image.sha256, (sample.image.path, caption))
    return list(chosen.values())[:PICTURES]


def _spread(shares: Shares) -> str:
    """The quartiles, to the width of a bin."""
    width, found, passed = (1 - shares.low) / BINS, [], 0
    for place, count in enumerate(shares.bins):
        for quarter in (0.25, 0.75):
            if passed < quarter * shares.total <= passed + count:
                found.append(shares.low + place * width + (width if quarter > 0.5 else 0))
        passed += count
    return f"{found[0]:.1f} to {found[1]:.1f}"


def _failures(report: Report, numbers: dict[str, Any]) -> None:
    if not numbers["failures"]:
        return
    report.section("Failures", "What could not be made, by the beginning of the reason.")
    rows = [[_NAMES.get(entry["task"], "–"), entry["reason"], entry["count"]] for entry in numbers["failures"][:ROWS]]
    report.table(["task", "reason", "times"], rows)


def _examples(report: Report, quality: Quality) -> None:
    report.section("Examples", "All that was made of some items, drawn at random.")
    for result in quality.shown:
        item = result.item
        report.text(
            f"{item.title} ({item.category}, {item.type}). {item.text:.600}{'…' if len(item.text) > 600 else ''}"
        )
        report.conversations(
            [
                {
                    "label": _NAMES[sample.task],
                    "turns": sample.turns,
                    "image": None if sample.image is None else sample.image.path,
                }
                for sample in result.samples
            ]
        )


def _pooled(shares: Any) -> float | None:
    total = sum(each.total for each in shares)
    return sum(each.sum for each in shares) / total if total else None
