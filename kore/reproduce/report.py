"""report.html of a reproduction: one page with everything, and what it proves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kore.reproduce.cell import PROJECTOR_RATE
from kore.reproduce.findings import CUTS, METHODS
from kore.reproduce.observations import FAILS, HOLDS, OPEN, Observation, Part, overall
from kore.reproduce.settings import RULE, read_tuned
from kore.reproduce.studies import AUGMENTED, BALANCED, BASELINES, KORE, LLAVA, LORA_RANK, TWO_SIDED, plain, rows_of
from kore.reproduce.tables import UNTOUCHED, Results, Table, interval, ranking
from kore.reproduce.world.new import TYPES
from kore.reproduce.world.old import DIMENSIONS
from kore.statistics import Interval

_CASES_NEW, _CASES_OLD = 8, 8
_SHOWN = (KORE, TWO_SIDED, "lora", "replay", "full", "ewc", plain("lora"), plain("replay"))
_DIFFERENCES = (
    "Models: a LLaVA of 1.7 M and a Qwen2.5-VL of 1.7 M parameters, of the real classes, pre-trained here on drawn "
    "worlds; the paper's have 7 and 13 billion. Which method keeps or learns more there, a model of this size cannot "
    "tell.\n\n"
    "Knowledge: new animals and contests with four facts each in place of EVOKE; old tasks in the paper's seven "
    "dimensions in place of its twelve benchmarks. K.R is the mean of the dimensions, so that the ones with many "
    "tasks do not weigh more. Nothing old is asked with yes or no for an answer, which models of this size do not "
    "learn here; hallucination is answering a question about what is not in the picture.\n\n"
    "Worlds: every number is a mean over models that were pre-trained in different worlds, with a 95 % interval of "
    "Student's t; leads over KORE are paired by world. The paper trains once. Intervals are not adjusted for their "
    "number.\n\n"
    "Data: the paper trains KORE on augmented data and every baseline on the data as they are. Here each baseline has "
    "both rows, all with as many steps. General augmentations have the rate of “w/o constraint”; the one with a "
    "language model is left out.\n\n"
    "Rates: chosen for every row by one rule with as many measured settings, on a world that no table is of. A row "
    "marked † has the rate where its search would begin. The specific constraints and other ranks have KORE's rate.\n\n"
    "Baselines: what stood for the task before in the paper's O-LoRA and SEFE is not published; here it is an adapter "
    "trained on the old data. Their strengths are searched for like the rates. The moving average of CIA, by the rule "
    "of its paper, spans about two of the few steps here, so that its answers are those of LoRA."
)


def write_report(
    work: Any,
    results: Results,
    tables: Mapping[str, Table],
    claims: Sequence[Observation],
    values: Mapping[str, Any],
) -> Path:
    """Write the page; returns its path."""
    from kore.report.page import Report

    worlds = len(work.worlds)
    report = Report(
        "KORE in miniature",
        "A quick look at whether everything runs. One world and short schedules: it proves nothing."
        if work.quick
        else f"The paper's comparison on small models of the real classes, over {worlds} pre-trained worlds.",
    )
    report.tiles(_tiles(results))
    report.section("Result", _summary(results, work.quick, tables))
    _plane(report, results)
    _observations(report, claims, work.quick)
    for name, table in tables.items():
        report.section(table.title, _about(name, table))
        _table(report, table)
        _figure(report, name, results, table)
    _losses(report, results)
    _findings(report, results)
    _cases(report, work, results)
    report.section("What differs from the paper, and why", _DIFFERENCES)
    _setting(report, work, tables, values)
    return report.write(work.directory / "report.html")


def _mean(results: Results, row: str, measure: str) -> Interval | None:
    return interval(results.values(f"{LLAVA}/{row}", measure))


def _text(value: Interval | None, spec: str = ".1f") -> str | None:
    """Mean ± half the interval, which is symmetric."""
    if value is None:
        return None
    return format(value.value, spec) + ("" if value.high is None else f" ± {value.high - value.value:.1f}")


def _tiles(results: Results) -> list[tuple[str, str, str]]:
    found = []
    for row, label in ((KORE, "KORE"), (BALANCED, "balanced C"), (TWO_SIDED, "two-sided"), ("lora", "LoRA, same data")):
        score, ka, kr = (_mean(results, row, measure) for measure in ("hars", "ka", "kr"))
        if score and ka and kr:
            found.append((f"{label}: HARS", f"{score.value:.1f}", f"new {ka.value:.0f} · old {kr.value:.0f}"))
    return found


def _summary(results: Results, quick: bool, tables: Mapping[str, Table]) -> str:
    paragraphs = [
        "K.A: questions about new knowledge, mean of CEM and F1. K.R: old questions, mean over seven dimensions. Avg "
        "is their mean, HARS the harmonic mean of relative gain and relative retention (paper, section 4). Percent; "
        "what follows ± is half of a 95 % interval over worlds."
    ]
    for measure, name in (("hars", "HARS"), ("avg", "Avg")):
        order = ranking(results, LLAVA, measure)
        place = next((number for number, (label, _) in enumerate(order, 1) if label == "KORE"), None)
        if place is not None:
            listed = ", ".join(f"{label} {value:.1f}" for label, value in order)
            paragraphs.append(f"By {name} KORE is number {place} of {len(order)}: {listed}.")
    if any(not line.tuned for table in tables.values() for line in table.lines):
        paragraphs.append("Rows marked † have a learning rate that was not tuned; compare them with care.")
    if quick:
        paragraphs.append(
            "This is --quick: one world, short training, learning rates for longer runs. It proves nothing."
        )
    return "\n\n".join(paragraphs)


def _plane(report: Any, results: Results) -> None:
    from kore.report import figures

    before = [interval(results.untouched(LLAVA, measure)) for measure in ("ka", "kr")]
    if before[0] is None or before[1] is None:
        return
    baseline = [one.value for one in before if one is not None]
    main = rows_of("main")
    for data, words in ((AUGMENTED, "on the same augmented data"), ("plain", "on plain data, as in the paper")):
        points, ends = {}, {}
        for row in main:
            if row.method in BASELINES and (row.data == AUGMENTED) != (data == AUGMENTED):
                continue
            ka, kr = results.values(row.id, "ka"), results.values(row.id, "kr")
            if ka:
                label = row.label.removesuffix(", same data")
                points[label] = [(ka[world], kr[world]) for world in ka]
                both = (interval(ka), interval(kr))
                ends[label] = [(one.low, one.high) for one in both if one is not None]
        if points:
            report.figure(
                figures.adaptation_retention_plane(points, baseline, ends),
                f"New knowledge learned (right) against old knowledge kept (up), baselines {words}. A small dot a "
                "world, crosses are 95 % intervals; faint lines: equal HARS.",
            )


def _observations(report: Any, claims: Sequence[Observation], quick: bool) -> None:
    counts = [sum(claim.verdict == verdict for claim in claims) for verdict in (HOLDS, FAILS, OPEN)]
    report.section(
        "The paper's observations",
        f"Eleven observations and two findings: {counts[0]} hold, {counts[1]} do not, {counts[2]} cannot be told. A "
        "claim holds where every number that it is made of is above 0 with its whole interval, and does not hold where "
        "one of them is below. The second verdict has every baseline on KORE's augmented data."
        + (" With one world nothing can be told." if quick else ""),
    )
    rows = [
        [claim.name, claim.verdict, overall(claim.like_for_like) if claim.like_for_like else None, claim.claim]
        for claim in claims
    ]
    report.table(["", "as the paper ran it", "same data", "claim"], rows)
    for claim in claims:
        lines = [f"In the paper: {claim.paper}.", claim.remark, "", *map(_part, claim.parts)]
        if claim.like_for_like:
            lines += ["", "same data:", *map(_part, claim.like_for_like)]
        report.code("\n".join(lines), f"{claim.name}: the numbers")


def _part(part: Part) -> str:
    return f"{part.verdict:14}  {part.text:60}  {'–' if part.value is None else format(part.value, '+.2f')}"


def _about(name: str, table: Table) -> str:
    words = {
        "main": "“Same data” rows are trained on KORE's augmented data, the others on plain data, as in the paper.",
        "types": "Mean of CEM and F1 for each fact that is asked for.",
        "dimensions": "Percent right in each dimension of the old tasks.",
        "specific": "KORE with the covariance of one dimension, the paper's merge and KORE's learning rate.",
        "architecture": "Qwen2.5-VL, every method on the augmented data.",
        "ablation": "“w/o frozen A” has the rank that gives it as many trained parameters.",
        "augmentation": "All without constraint, at its learning rate; as many conversations each.",
        "rank": f"Matched to a LoRA of rank {LORA_RANK}: KORE's own row. All at KORE's learning rate.",
    }.get(name, "")
    return words + (f" Not run: {', '.join(table.missing)}." if table.missing else "")


def _table(report: Any, table: Table) -> None:
    rows = []
    for line in table.lines:
        numbers = [
            _text(line.values.get(column), "+.1f" if column.endswith("lead") else ".1f") for column in table.columns
        ]
        rows.append([line.label + ("" if line.tuned else " †"), *numbers])
    leads = " Leads are over KORE, paired by world." if any(name.endswith("lead") for name in table.columns) else ""
    report.table(["", *table.columns], rows, f"Mean over worlds ± half of the 95 % interval.{leads} † not tuned.")


def _bars(results: Results, names: Sequence[str], prefix: str, rows: Sequence[str]) -> dict[str, Any]:
    scores: dict[str, dict[str, tuple[float, float | None, float | None]]] = {}
    labels = {row.name: row.label for row in rows_of("main")}
    for row in rows:
        found = {name: _mean(results, row, f"{prefix}:{name}") for name in names}
        if any(value is not None for value in found.values()):
            scores[labels[row]] = {
                name: (value.value, value.low, value.high) for name, value in found.items() if value is not None
            }
    return scores


def _figure(report: Any, name: str, results: Results, table: Table) -> None:
    from kore.report import figures

    chosen = [row for row in _SHOWN if row in {one.name for one in rows_of("main")}][:6]
    if name == "types":
        scores = _bars(results, list(TYPES), "types", chosen)
        report.figure(figures.type_bars(scores), "By type, with 95 % intervals.") if scores else None
    elif name == "dimensions":
        scores = _bars(results, list(DIMENSIONS), "dimensions", chosen)
        figure = figures.type_bars(scores, "percent right") if scores else None
        report.figure(figure, "By dimension, with 95 % intervals.") if figure else None
    elif name == "rank":
        _ranks(report, table)


def _ranks(report: Any, table: Table) -> None:
    from kore.report import figures

    lines = sorted((line for line in table.lines if line.trainable), key=lambda line: line.trainable or 0)
    curves = {
        column: [
            (line.trainable or 0, one.value, one.low, one.high)
            for line in lines
            for one in [line.values.get(column)]
            if one is not None
        ]
        for column in ("K.A", "K.R", "Avg", "HARS")
    }
    if lines:
        report.figure(figures.measured_curves(curves, "trained parameters", "percent"), "KORE over its rank.")


def _losses(report: Any, results: Results) -> None:
    from kore.report import figures

    histories = {}
    for row in rows_of("losses"):
        cells = results.cells.get(row.id)
        if cells:
            histories[row.label] = cells[min(cells)]["history"]
    if histories:
        report.section(
            "Loss curves (the paper's Figure 10)",
            "Loss on the new answers with what a method adds to it, first world. Baselines train on plain data, KORE "
            "on augmented data, which is harder to fit; heights of the two do not compare.",
        )
        report.figure(figures.loss_curves(histories))


def _findings(report: Any, results: Results) -> None:
    from kore.report import figures

    found = [marks["findings"] for _, marks in sorted(results.before.get(LLAVA, {}).items()) if marks.get("findings")]
    if not found:
        return
    report.section(
        "Two findings about covariances (the paper's Table 7 and Figure 4)",
        "K.R of the untouched model when every layer is rebuilt without its smallest components, and how alike the "
        "covariances of single tasks are: cosine, mean over the layers' inputs, first world.",
    )
    from kore.statistics import seed_interval

    rows = [
        [
            method,
            *(_text(seed_interval([each["reconstruction"][method][f"{cut:g}"] for each in found])) for cut in CUTS),
        ]
        for method in METHODS
    ]
    report.table(["dropped", *(f"{cut:.1%}" for cut in CUTS)], rows)
    first = found[0]["similarity"]
    report.figure(figures.similarity_matrices(first["tasks"], {"cosine of the covariances": first["matrix"]}))


def _cases(report: Any, work: Any, results: Results) -> None:
    """Questions in turn, never chosen by how they were answered."""
    from kore.evaluation import load_result

    world = work.worlds[0]
    rows = [row for row in rows_of("cases") if world in results.cells.get(row.id, {}) and row.family == LLAVA]
    if not rows or world not in results.before.get(LLAVA, {}):
        return
    report.section(
        "Case study",
        "The same questions to every model in the first world, taken in turn from the list and never by how they were "
        "answered. Baselines train on plain data, as in the paper.",
    )
    samples = []
    for part, count in (("new", _CASES_NEW), ("old", _CASES_OLD)):
        folders = {UNTOUCHED: work.untouched_folder(LLAVA, world)}
        folders |= {row.label: work.cell_folder(row, world) for row in rows}
        said = {
            label: {one.question_id: one for one in load_result(folder / part).answers}
            for label, folder in folders.items()
        }
        asked = list(said[UNTOUCHED])
        for identifier in asked[:: max(1, len(asked) // count)][:count]:
            samples.append(_case(part, {label: answers[identifier] for label, answers in said.items()}))
    report.samples(samples)


def _case(part: str, answers: Mapping[str, Any]) -> dict[str, Any]:
    from kore.reproduce.scoring import is_right

    first = next(iter(answers.values()))
    return {
        "label": f"{part} knowledge · {first.type}",
        "image": first.image,
        "question": first.question,
        "expected": first.answer,
        "answers": {label: answer.prediction for label, answer in answers.items()},
        "correct": {label: is_right(first.type, answer.prediction, first.answer) for label, answer in answers.items()},
    }


def _setting(report: Any, work: Any, tables: Mapping[str, Table], values: Mapping[str, Any]) -> None:
    tuned = read_tuned()
    report.section("Setting")
    plan = next(iter(work.plans.values()))
    report.facts(
        {
            "worlds": ", ".join(map(str, work.worlds)),
            "pre-training": ", ".join(f"{name} {value:g}" for name, value in asdict(plan.schedule).items()),
            "data": ", ".join(f"{name} {value}" for name, value in asdict(plan.sizes).items()),
            "budget": f"{work.budget.steps} steps of {work.budget.batch_size} conversations, cosine, warm-up 0.03",
            "adapters": f"as many trained parameters as a LoRA of rank {LORA_RANK}",
            "projector": f"trained at {PROJECTOR_RATE:g} by every method",
            "settings": RULE,
            "tuned rows": len(tuned["rows"]),
            "failed": ", ".join(values["failures"]) or None,
        }
    )
    lines = {line.row: line for table in tables.values() for line in table.lines if line.row}
    report.table(
        ["row", "worlds", "trained parameters", "learning rate", "strength"],
        [
            [row + ("" if line.tuned else " †"), line.worlds, line.trainable, f"{line.learning_rate:g}",
             None if line.strength is None else f"{line.strength:g}"]
            for row, line in lines.items()
        ],
        "What every row was given. † not tuned.",
    )  # fmt: skip
    for row, found in sorted(tuned["rows"].items()):
        tried = "\n".join(map(str, found["measured"]))
        report.code(tried, f"Measured for {row}; taken: rate {found['learning_rate']:g}")
