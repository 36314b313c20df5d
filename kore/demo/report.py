"""The demo's report.html."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kore.demo.methods import KORE_RANK, LORA_RANK, PROJECTOR_RATE, TUNED, Method
from kore.demo.pictures import pictures
from kore.demo.summary import COLUMNS, UNTOUCHED, Row, best

_SAMPLES_OLD, _SAMPLES_NEW = 4, 6


def write(
    path: Path,
    comparison: Any,
    methods: dict[str, Method],
    cells: dict[str, list[dict[str, Any]]],
    before: list[dict[str, Any]],
    table: list[Row],
) -> Path:
    """Write the page from the finished comparison; returns its path."""
    from kore.report import figures
    from kore.report.page import Report

    recipe, seeds = comparison.recipe, len(before)
    report = Report(
        "KORE demo",
        f"A LLaVA of {recipe['parameters'] / 1e6:.1f} M parameters learns {_creatures()} new animals. "
        "What does it learn, and what does it forget?",
    )
    report.tiles([_tile(row, table) for row in table[1:]])
    report.section("Result", _result_text(table, seeds))
    report.table(
        ["method", "learning rate", "trained parameters", *COLUMNS],
        [
            [
                row.label,
                "–" if row.learning_rate is None else f"{row.learning_rate:g}",
                row.trainable or None,
                *(row.values[column] for column in COLUMNS),
            ]
            for row in table
        ],
        f"Percent; mean ± standard deviation over {seeds} seeds." if seeds > 1 else "Percent; one seed.",
        best=dict.fromkeys(("K.A", "Avg", "HARS"), "max"),
        digits=1,
    )
    plane = {methods[name].label: [(c["ka"], c["kr"]) for c in cells[name]] for name in methods}
    untouched = [float(table[0].values[column] or 0) for column in ("K.A", "K.R")]
    report.figure(
        figures.adaptation_retention_plane(plane, untouched),
        "New knowledge learned (right) against old knowledge kept (up), a small dot a seed. Faint lines: equal HARS.",
    )
    _breakdown(report, methods, cells, before)
    report.section(
        "The world",
        "Old knowledge: tasks over real handwritten digits, shapes and twenty known animals (each a glyph), every "
        "question with the form its answer must have, and text-only facts. New knowledge: new animals, each with a "
        "name, a home, a food and a keeper.",
    )
    report.figure(pictures(comparison), "Above: old tasks. Below: the new animals of the first seed.")
    report.section("Sample answers", "The same questions to every model, first seed. None was seen in training.")
    report.samples(_samples(comparison.directory / "seed-0", comparison.directory / "untouched-old", methods))
    report.section("Training", "Each method has the same number of steps, batch size and schedule.")
    report.figure(figures.loss_curves({methods[name].label: cells[name][0]["history"] for name in methods}))
    _covariance(report, comparison, methods)
    _setting(report, comparison)
    return report.write(path)


def _creatures() -> int:
    from kore.demo.world.new import CREATURES

    return CREATURES


def _tile(row: Row, table: list[Row]) -> tuple[str, str, str]:
    ka, kr, avg = (float(row.values[column] or 0) for column in ("K.A", "K.R", "Avg"))
    mark = " · highest Avg" if row.label == best(table, "Avg") else ""
    return row.label, f"{avg:.1f}", f"new {ka:.0f} · old {kr:.0f}{mark}"


def _result_text(table: list[Row], seeds: int) -> str:
    untouched = float(table[0].values["K.R"] or 0)
    ranking = sorted(table[1:], key=lambda row: -(row.values["Avg"] or 0))
    order = ", ".join(f"{row.label} {row.values['Avg']:.1f}" for row in ranking)
    kept = ", ".join(f"{row.label} {float(row.values['K.R'] or 0) - untouched:+.1f}" for row in table[1:])
    caution = (
        "Differences smaller than the spread over seeds mean nothing."
        if seeds > 1
        else "One seed: small differences mean nothing; run without --quick for a spread."
    )
    return (
        "K.A: questions about the new animals, mean of cover exact match and F1. K.R: mean exact match over the old "
        "tasks. Avg is the mean of the two; HARS the harmonic mean of relative gain and relative retention (paper, "
        f"section 4).\n\nBy Avg: {order}.\n\nOld knowledge, change against the untouched model: {kept}. {caution}"
    )


def _breakdown(report: Any, methods: dict[str, Method], cells: dict, before: list[dict[str, Any]]) -> None:
    def mean(parts: list[dict[str, Any]], group: str, name: str) -> float:
        return sum(part[group][name] for part in parts) / len(parts)

    columns = [UNTOUCHED, *(method.label for method in methods.values())]
    everyone = [before, *(cells[name] for name in methods)]
    for group, title, words in (
        ("old_tasks", "Old knowledge by task", "Exact match in percent, mean over seeds."),
        ("new_facts", "New knowledge by fact", "Mean of CEM and F1 in percent, mean over seeds."),
    ):
        names = list(before[0][group])
        rows = [[name, *(mean(parts, group, name) for parts in everyone)] for name in names]
        report.section(title)
        report.table(["", *columns], rows, words, digits=1)


def _answers(folder: Path) -> dict[str, Any]:
    from kore.evaluation import load_result

    return {answer.question_id: answer for answer in load_result(folder).answers}


def _samples(seed: Path, untouched_old: Path, methods: dict[str, Method]) -> list[dict[str, Any]]:
    """A fixed choice of questions: one per kind in turn, never picked by how they were answered."""
    from kore.metrics import normalize_answer

    samples = []
    for part, label, count in (("new", "new knowledge", _SAMPLES_NEW), ("old", "old knowledge", _SAMPLES_OLD)):
        said = {UNTOUCHED: _answers(seed / "untouched" / "new" if part == "new" else untouched_old)}
        said.update({method.label: _answers(seed / name / part) for name, method in methods.items()})
        asked = list(said[UNTOUCHED])
        for identifier in asked[:: max(1, len(asked) // count)][:count]:
            first = said[UNTOUCHED][identifier]
            answers = {name: by_id[identifier].prediction for name, by_id in said.items()}
            samples.append(
                {
                    "label": f"{label} · {first.type}",
                    "image": first.image,
                    "question": first.question,
                    "expected": first.answer,
                    "answers": answers,
                    "correct": {
                        name: normalize_answer(answer) == normalize_answer(first.answer)
                        for name, answer in answers.items()
                    },
                }
            )
    return samples


def _covariance(report: Any, comparison: Any, methods: dict[str, Method]) -> None:
    from kore import analysis
    from kore.report import figures

    covariance = comparison.covariance
    groups = [group for group in covariance.groups if ".1." in group.name] or list(covariance.groups)[:4]
    names = [group.name for group in groups[:4]]
    short = {name: name.split("layers.")[-1] for name in names}
    report.section(
        "Covariance of the old inputs",
        "C = Σ xᵀx over old prompts, one mean a group of tasks, the groups weighted alike (the paper sums over all "
        "tokens). Layers that read the same input share one matrix. KORE's adapter reads only the quiet directions, "
        "shaded.",
    )
    report.figure(figures.covariance_heat_maps({short[name]: covariance[name] for name in names}))
    rank = comparison.rank
    report.figure(figures.spectra({short[name]: analysis.spectrum(covariance[name]) for name in names}, rank=rank))
    leaks = _leaks(comparison, methods)
    if leaks:
        report.section(
            "What the adapter reads",
            "Leak: the share of the input energy that lies in the directions the adapter reads, on held-out old "
            "questions and on new questions. Small on old and larger on new inputs is what the constraint is for.",
        )
        report.figure(figures.leak_per_layer(leaks))


def _leaks(comparison: Any, methods: dict[str, Method]) -> dict[str, dict[str, float]]:
    import kore
    from kore import analysis
    from kore.data import prompt_batches
    from kore.demo.cell import load_start
    from kore.demo.comparison import CAPTURE_BATCH

    model = load_start(comparison.checkpoint)
    held_out = {
        "old inputs": comparison.old_questions,
        "new inputs": comparison.new_questions,
    }
    leaks = {}
    adapters = {m.label: comparison.directory / "seed-0" / n / "train" / "adapter" for n, m in methods.items()
                if m.prepare in ("kore", "random-a") and m.augmented}  # fmt: skip
    for inputs, questions in held_out.items():
        prompts = prompt_batches([question.conversation() for question in questions], comparison.encoder, CAPTURE_BATCH)
        captured = kore.capture_covariance(model, prompts, progress=False)
        for label, adapter in adapters.items():
            leaks[f"{label}, {inputs}"] = analysis.leak(adapter, captured)
    return leaks


def _setting(report: Any, comparison: Any) -> None:
    budget, recipe = comparison.budget, comparison.recipe
    tuned = json.loads(TUNED.read_text(encoding="utf-8"))
    report.section("Setting")
    report.facts(
        {
            "model": "LlavaForConditionalGeneration: CLIP 96 wide, 2 layers; Llama 192 wide, 3 layers",
            "old knowledge": f"{len(recipe['old_task_accuracy']['test'])} tasks, "
            f"{recipe['old_task_mean']['test']:.3f} exact match when shipped",
            "budget": f"{budget.steps} steps of {budget.batch_size} conversations, cosine, warm-up 0.03",
            "learning rates": f"per method, {tuned['rule']}; projector at {PROJECTOR_RATE:g} for all",
            "validation worlds": ", ".join(map(str, tuned["worlds"])),
            "ranks": f"LoRA {LORA_RANK}; KORE {comparison.rank} ({KORE_RANK}: as many trained parameters)",
            "Full-FT": "language model and projector trained; vision tower frozen",
            "without augmentation": "one drawing and one statement an animal, repeated for the same number of steps",
            "checkpoint": f"sha256 {recipe['sha256'][:16]}…, seed {recipe['seed']}",
        }
    )
    report.code(json.dumps(tuned["measured"], indent=1), "Every learning rate tried on the validation world")
