"""The report of ``kore run``: what was learned, what was kept, and how."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kore.artifacts import file_sha256, read_json
from kore.metrics import average, hars
from kore.pipeline import report_augment
from kore.pipeline.config import AdapterSection, RunConfig
from kore.pipeline.stage import directory_identity, duration, read_record
from kore.pipeline.workbench import Workbench

_log = logging.getLogger(__name__)
_SAMPLES_PER_SET = 4
_LARGEST_SPECTRUM = 4608
_PANELS = 4


@dataclass(frozen=True)
class ReportStage:
    """``report.html`` of a run directory, from the results of the other stages."""

    config: RunConfig
    name: str = "report"

    @property
    def output(self) -> Path:
        return self.config.output_dir / "report.html"

    def inputs(self) -> dict[str, Any]:
        out = self.config.output_dir
        files = {"train": out / "train" / "history.json"}
        files |= {f"eval {when}": out / "eval" / when / "scores.json" for when in ("before", "after")}
        files |= {
            f"answers {path.parent.relative_to(out)}": path for path in sorted(out.glob("eval/*/*/*/answers.jsonl"))
        }
        directories = {name: out / name for name in ("covariance", "covariance-new", "augment")}
        directories["adapter"] = out / "train" / "adapter"
        return {
            "config": file_sha256(out / "config.yaml"),
            **{name: file_sha256(file) for name, file in files.items() if file.is_file()},
            **{name: directory_identity(path) for name, path in directories.items() if path.is_dir()},
        }

    def complete(self) -> bool:
        return self.output.is_file()

    def check(self, context: Workbench) -> None:
        """Nothing: what the report shows is made by the other stages."""

    def run(self, context: Workbench) -> str:
        both = write_report(self.config, self.output, context)
        return ", ".join(f"{name} {value:.2f}" for name, value in both.items()) or "written"


def write_report(config: RunConfig, path: Path, context: Workbench | None = None) -> dict[str, float]:
    """Write the report of a finished run; returns Avg and HARS where there are new and old questions.

    ``context`` lends the model that it holds, for the size of the layers' outputs.
    """
    from kore.report import Report

    out = config.output_dir
    title = f"{_method(config.adapter)} on {Path(config.model.path).name}"
    report = Report(title, f"{out} · {datetime.now(timezone.utc):%d %B %Y}")
    both: dict[str, float] = {}
    if (out / "eval" / "after" / "scores.json").is_file():
        before, after = (read_json(out / "eval" / when / "scores.json") for when in ("before", "after"))
        both = _headline(report, before, after)
        _scores(report, before, after)
    if config.augment is not None:
        report_augment.add_section(report, out / "augment")
    _training(report, out)
    if (out / "covariance").is_dir():
        _covariance(report, config, out)
        _changes(report, out, context)
    _answers(report, out)
    _run(report, config, out)
    report.write(path)
    return both


def _method(adapter: AdapterSection) -> str:
    words = [adapter.baseline().title]
    if adapter.train_a:
        words.append("A trained")
    if adapter.strength != 1:
        words.append(f"strength {adapter.strength:g}")
    if adapter.chosen_groups is not None:
        words.append(f"null space of {', '.join(adapter.chosen_groups)}")
    return ", ".join(words)


def _headline(report: Any, before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    tiles, both = [], {}
    names = {"ka": "K.A, new knowledge", "kr": "K.R, old knowledge"}
    for key, label in names.items():
        if after[key] is not None:
            tiles.append((label, f"{after[key]:.2f}", f"{before[key]:.2f} before"))
    if len(tiles) == 2:
        both["Avg"] = average(after["ka"], after["kr"])
        both["HARS"] = hars(after["ka"], after["kr"], before["ka"], before["kr"])
        tiles.append(("Avg", f"{both['Avg']:.2f}", f"{average(before['ka'], before['kr']):.2f} before"))
        tiles.append(("HARS", f"{both['HARS']:.2f}", "both in one number"))
    report.tiles(tiles)
    return both


def _scores(report: Any, before: dict[str, Any], after: dict[str, Any]) -> None:
    report.section(
        "Scores",
        "Percent, over all questions of a set and by question type. CEM: the expected answer stands in the model's "
        "answer. F1: words in common. K.A is the mean of both on new knowledge; K.R is the mean CEM on old.",
    )
    rows = []
    for group in ("new", "old"):
        for name, result in after[group].items():
            past = before[group][name]
            kinds = [("all", result["overall"], past["overall"])]
            if len(result["by_type"]) > 1:
                kinds += [(kind, score, past["by_type"][kind]) for kind, score in result["by_type"].items()]
            for kind, new, old in kinds:
                rows.append([group, name, kind, new["count"], old["cem"], new["cem"], old["f1"], new["f1"]])
    columns = ["", "set", "type", "questions", "CEM before", "CEM after", "F1 before", "F1 after"]
    report.table(columns, rows)


def _training(report: Any, out: Path) -> None:
    from kore.report import figures

    history = read_json(out / "train" / "history.json")
    report.section("Training")
    if len([entry for entry in history if "loss" in entry]) > 1:
        report.figure(figures.loss_curves({"training": history}), "Loss on the answer tokens of the new data.")
    last: dict[str, Any] = next((entry for entry in reversed(history) if "loss" in entry), {})
    loss = f"{last['loss']:.4f}" if last else None
    facts = {"steps": last.get("step"), "epochs": last.get("epoch"), "last loss": loss}
    if "penalty" in last:
        facts |= {"of that, the penalty": f"{last['penalty']:.4f}"}
    if "old_divergence" in last:
        facts |= {"estimated cost on old data": f"{last['old_divergence']:.2g} nats for each old token"}
    report.facts(facts)


def _covariance(report: Any, config: RunConfig, out: Path) -> None:
    from kore import analysis
    from kore.covariance import load_covariance
    from kore.report import figures

    covariance = load_covariance(out / "covariance")
    adapter = out / "train" / "adapter"
    report.section(
        "Old knowledge and the adapter",
        f"C is the covariance of a layer's inputs on the old data. {_what_it_reads(config.adapter)}",
    )
    settings = read_json(adapter / "adapter_config.json")
    others = {name.removeprefix("^"): rank for name, rank in settings.get("rank_pattern", {}).items()}
    ranks = {module: others.get(module, settings.get("r")) for module in covariance.modules}
    leaks = {"old inputs": analysis.leak(adapter, covariance)}
    if (out / "covariance-new").is_dir():
        leaks["new inputs"] = analysis.leak(adapter, load_covariance(out / "covariance-new"))
    leaks["random directions"] = {
        module: min(1.0, ranks[module] / covariance.group(module).dim) for module in leaks["old inputs"]
    }
    means = ", ".join(f"{name} {sum(values.values()) / len(values):.1e}" for name, values in leaks.items())
    report.figure(
        figures.leak_per_layer(leaks),
        f"Leak: the share of the inputs' energy that the adapter reads, layer by layer. Means: {means} (rank / d_in).",
    )
    shown = {module: covariance[module] for module in _representatives(covariance)}
    report.figure(
        figures.covariance_heat_maps(shown), "|C| of some layers, averaged over blocks, each relative to its largest."
    )
    small = {module: matrix for module, matrix in shown.items() if len(matrix) <= _LARGEST_SPECTRUM}
    if small:
        spectra = {module: analysis.spectrum(matrix) for module, matrix in small.items()}
        least, several = min(ranks[module] for module in small), len({ranks[module] for module in small}) > 1
        reads = ""
        if _reads_c(config.adapter):
            reads = f", which the adapter reads{' in every layer; in some it reads more' if several else ''}"
        report.figure(
            figures.spectra(spectra, least), f"Eigenvalues of C. Shaded: the {least} smallest directions{reads}."
        )


def _reads_c(adapter: AdapterSection) -> bool:
    """Whether the adapter reads the smallest directions of C and no others."""
    trained = adapter.train_a or adapter.method == "lora-null-v1"
    return adapter.needs_covariance and not trained and adapter.strength == 1 and adapter.chosen_groups is None


def _what_it_reads(adapter: AdapterSection) -> str:
    if _reads_c(adapter):
        return (
            "The adapter reads the directions in which C is smallest, so that what it learns leaves old inputs alone."
        )
    if not adapter.needs_covariance:
        return f"The method, {_method(adapter)}, does not choose directions by it."
    groups = adapter.chosen_groups
    C = "C" if groups is None else f"the covariance of {', '.join(groups)}"
    if adapter.strength != 1:
        return (
            f"At strength {adapter.strength:g} the adapter reads directions between random ones and those in which {C} "
            "is smallest."
        )
    if adapter.train_a or adapter.method == "lora-null-v1":
        return f"The adapter read the directions in which {C} is smallest when training, of A too, began."
    return f"The adapter reads the directions in which {C} is smallest."


def _changes(report: Any, out: Path, context: Workbench | None) -> None:
    """What the adapter changed; a finished run does not fail because this cannot be measured."""
    from kore.pipeline.report_layers import add_section

    if not (out / "train" / "adapter" / "adapter_config.json").is_file():
        return
    try:
        add_section(report, out, None if context is None else context.held())
    except Exception as error:
        line = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        _log.warning("the report has no changes by layer: %s", line)
        report.section("What training changed in each layer", f"Could not be measured ({line}).")


def _representatives(covariance: Any) -> list[str]:
    """One module for each kind of input, from the middle of the model."""
    kinds: dict[str, list[str]] = {}
    for group in covariance.groups:
        kinds.setdefault(group.name.rpartition(".")[2], []).append(group.name)
    return [names[len(names) // 2] for names in list(kinds.values())[:_PANELS]]


def _answers(report: Any, out: Path) -> None:
    from kore.evaluation import load_result

    samples = []
    for directory in sorted((out / "eval" / "after").glob("*/*/"), key=lambda path: (path.parts[-2], path.name)):
        group, name = directory.parts[-2:]
        after = load_result(directory).answers
        before = load_result(out / "eval" / "before" / group / name).answers
        step = max(1, len(after) // _SAMPLES_PER_SET)
        for old, new in list(zip(before, after))[::step][:_SAMPLES_PER_SET]:
            samples.append(
                {
                    "label": " · ".join(dict.fromkeys(part for part in (group, name, new.type) if part)),
                    "image": new.image,
                    "question": new.question,
                    "expected": new.answer,
                    "answers": {"before": old.prediction, "after": new.prediction},
                    "correct": {"before": bool(old.cem), "after": bool(new.cem)},
                }
            )
    if samples:
        report.section("Sample answers", "Evenly spaced through each question set, not chosen. The mark is CEM.")
        report.samples(samples)


def _run(report: Any, config: RunConfig, out: Path) -> None:
    from kore.environment import environment

    report.section("Run")
    records = {
        "augmentation": out / "augment",
        "capture": out / "covariance",
        "capture of gradients": out / "gradients",
        "evaluation before": out / "eval" / "before",
        "initialisation": out / "adapter-init",
        "training": out / "train",
        "evaluation after": out / "eval" / "after",
    }
    rows = []
    for label, directory in records.items():
        record = read_record(directory)
        if record.get("state") == "done":
            rows.append(
                [
                    label,
                    record["result"],
                    duration(record["seconds"]),
                    record["finished"].partition("+")[0].replace("T", " "),
                ]
            )
    report.table(["stage", "result", "time", "finished (UTC)"], rows)
    adapter = config.adapter
    report.facts(
        {
            "model": config.model.path,
            "method": adapter.method,
            "recipe": config.recipe_line(),
            "rank": adapter.rank if not adapter.baseline().in_full else None,
            "old data": ", ".join(str(file) for file in config.old.files) if config.old else None,
            "new data": ", ".join(str(file) for file in config.new_data.files),
            "learning rate": config.train.learning_rate,
            "epochs": config.train.epochs if config.train.max_steps is None else f"{config.train.max_steps} steps",
            "seed": config.seed,
        }
    )
    report.code((out / "config.yaml").read_text(encoding="utf-8"), "Whole configuration")
    report.section("Environment").facts(environment())
