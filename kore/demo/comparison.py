"""The demo itself: write the world, capture the covariance, train and ask every method, compare, report."""

from __future__ import annotations

import json
import os
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from kore.artifacts import atomic_write
from kore.demo.methods import (
    FULL,
    KORE_RANK,
    LORA_RANK,
    PROJECTOR_RATE,
    QUICK,
    Budget,
    Method,
    chosen,
    tuned_learning_rates,
)
from kore.environment import environment
from kore.errors import ConfigError

CAPTURE_BATCH = 64
FIRST_WORLD = 1


def run(
    output_dir: str | os.PathLike[str],
    quick: bool = False,
    seeds: int = 2,
    methods: list[str] | None = None,
) -> dict[str, Any]:
    """Compare Full-FT, LoRA, KORE, KORE without constraint and KORE without augmentation on a small real LLaVA.

    The cells run in processes of their own, so a script that calls this needs an `if __name__ == "__main__":` guard.

    Args:
        output_dir: Everything is written here: the data as LLaVA JSON and PNG, the covariance, the adapters, the
            answers, `results.json` and `report.html`. Cells (method, seed) that are done there are not run again.
        quick: One seed, fewer steps and questions.
        seeds: Seeds; each has creatures of its own.
        methods: Names out of `kore.demo.methods.METHODS`; None runs all.

    Returns:
        What `results.json` holds.
    """
    from rich.console import Console

    from kore.demo import report, summary
    from kore.demo.cell import training_settings
    from kore.demo.files import write_run_config

    started = time.perf_counter()
    if seeds < 1:
        raise ConfigError(f"seeds: expected at least 1, got {seeds}")
    selected, rates = chosen(methods), tuned_learning_rates()
    budget, count = (QUICK, 1) if quick else (FULL, seeds)
    directory = Path(output_dir)
    console = Console()
    quiet_libraries()
    comparison = Comparison(directory, budget, console)
    comparison.prepare()
    worlds = [comparison.world(seed) for seed in range(count)]
    before = [untouched for _, untouched in worlds]
    cells = comparison.cells(selected, rates, [inputs for inputs, _ in worlds])
    if "kore" in selected:
        write_run_config(directory, comparison.checkpoint, training_settings(rates["kore"], budget), KORE_RANK)
    table = summary.rows(selected, cells, before)
    results = {
        "quick": quick,
        "seeds": count,
        "budget": budget.as_dict(),
        "ranks": {"lora": LORA_RANK, "kore": comparison.rank},
        "learning_rates": {name: rates[name] for name in selected},
        "projector_learning_rate": PROJECTOR_RATE,
        "table": summary.as_json(table),
        "before": before,
        "cells": cells,
        "environment": environment(),
    }
    page = report.write(directory / "report.html", comparison, selected, cells, before, table)
    results["seconds"] = time.perf_counter() - started
    atomic_write(directory / "results.json", json.dumps(results, indent=1))
    seeds_text = f"{count} seeds" if count > 1 else "1 seed"
    summary.print_table(table, f"New knowledge and old knowledge, percent, {seeds_text}", console)
    console.print(
        f"K.A: new questions, mean of CEM and F1. K.R: old tasks, exact match. {results['seconds']:.0f} s in all.\n"
        f"Report: {page}\nThe data are ordinary files; `kore run {directory / 'kore-run.yaml'}` trains on them.",
        highlight=False,
    )
    return results


class Comparison:
    """What the cells of one output directory share, made step by step."""

    def __init__(self, directory: Path, budget: Budget, console: Any, old_split: str = "test") -> None:
        self.directory, self.budget, self.console, self.old_split = directory, budget, console, old_split

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def prepare(self) -> None:
        """Check the checkpoint, write the old data, capture its covariance, load the old questions."""
        from kore.adapter import resolve_rank
        from kore.data import load_conversations, load_questions
        from kore.demo.cell import load_start
        from kore.demo.checkpoint import checked_checkpoint
        from kore.demo.encoding import CachedEncoder
        from kore.demo.files import write_old_samples, write_questions
        from kore.demo.world.old import old_items
        from kore.models import language_model_linears

        self.checkpoint, self.recipe = checked_checkpoint()
        self.encoder = CachedEncoder.from_pretrained(self.checkpoint)
        old = self.directory / "data" / "old"
        samples = write_old_samples(old)
        file = write_questions(
            old_items(self.old_split, self.budget.old_questions_per_task), old / f"questions-{self.old_split}.jsonl"
        )
        self.old_questions = load_questions(file)
        groups = {name: load_conversations(path) for name, path in samples.items()}
        started = time.perf_counter()
        model = load_start(self.checkpoint)
        self.rank = resolve_rank(model, language_model_linears(model), KORE_RANK)
        self.covariance = capture_balanced(model, self.encoder, groups)
        self.covariance.save(self.directory / "covariance")
        self.say(
            f"covariance of {sum(map(len, groups.values()))} old conversations: {self.covariance} "
            f"({time.perf_counter() - started:.1f} s)"
        )

    def world(self, seed: int, world: int | None = None, split: str = "test") -> tuple[Any, dict[str, Any]]:
        """Inputs of the cells of one seed, and the untouched model's marks."""
        from kore.data import load_conversations, load_questions
        from kore.demo.cell import Inputs, ask, load_start, marks
        from kore.demo.files import write_new_knowledge

        folder = self.directory / "data" / f"new-{seed}"
        files = write_new_knowledge(
            folder, FIRST_WORLD + seed if world is None else world, split, self.budget.questions_per_fact
        )
        inputs = Inputs(
            checkpoint=self.checkpoint,
            checkpoint_sha256=self.recipe["sha256"],
            encoder=self.encoder,
            covariance=self.covariance,
            augmented=load_conversations(files.augmented),
            plain=load_conversations(files.plain),
            new_questions=load_questions(files.questions),
            old_questions=self.old_questions,
        )
        model, cells = load_start(self.checkpoint), self.directory / f"seed-{seed}"
        new = ask(model, self.encoder, inputs.new_questions, cells / "untouched" / "new")
        old = ask(model, self.encoder, inputs.old_questions, self.directory / "untouched-old")
        untouched = marks(new, old)
        self.new_questions = inputs.new_questions
        self.say(f"seed {seed}: untouched model, K.A {untouched['ka']:.1f}, K.R {untouched['kr']:.1f}")
        return inputs, untouched

    def cell(self, name: str, method: Method, inputs: Any, rate: float, seed: int) -> dict[str, Any]:
        """One cell, in this process."""
        from kore.demo.cell import run_cell

        with self.console.status(f"seed {seed}: training {method.label}"):
            cell = run_cell(method, inputs, rate, seed, self.budget, self.directory / f"seed-{seed}" / name)
        self._say_cell(method, seed, cell)
        return cell

    def cells(
        self, methods: dict[str, Method], rates: dict[str, float], inputs: list[Any]
    ) -> dict[str, list[dict[str, Any]]]:
        """Every method on every seed's inputs, one cell a core: the model is too small to gain from more threads."""
        from kore.demo.cell import run_in_worker

        jobs = [(name, seed) for seed in range(len(inputs)) for name in methods]
        workers = min(len(jobs), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2, 4)
        done: dict[tuple[str, int], dict[str, Any]] = {}
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
        try:
            futures = {
                pool.submit(
                    run_in_worker,
                    methods[name],
                    replace(inputs[seed], encoder=None, covariance=None),
                    rates[name],
                    seed,
                    self.budget,
                    self.directory / f"seed-{seed}" / name,
                    self.directory / "covariance",
                ): (name, seed)
                for name, seed in jobs
            }
            with self.console.status(f"training and asking {len(jobs)} models, {workers} at a time"):
                for future in as_completed(futures):
                    name, seed = futures[future]
                    done[name, seed] = future.result()
                    self._say_cell(methods[name], seed, done[name, seed])
        finally:
            pool.shutdown(cancel_futures=True)
        return {name: [done[name, seed] for seed in range(len(inputs))] for name in methods}

    def _say_cell(self, method: Method, seed: int, cell: dict[str, Any]) -> None:
        how = "done before" if cell.get("skipped") else f"{cell['train_seconds']:.0f} + {cell['eval_seconds']:.0f} s"
        self.say(f"seed {seed}: {method.label}, K.A {cell['ka']:.1f}, K.R {cell['kr']:.1f} ({how})")


def quiet_libraries() -> None:
    """Leave the terminal to the demo's own lines."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def capture_balanced(model: Any, encoder: Any, groups: dict[str, Any]) -> Any:
    """One covariance for each group of old tasks, merged with weights 1 / tokens.

    The paper sums over all tokens. In a small model rare knowledge (text facts, few tokens) then falls into the
    quiet directions; a mean over groups of the mean over tokens keeps it.
    """
    import kore
    from kore.data import prompt_batches

    sets = [
        kore.capture_covariance(model, prompt_batches(conversations, encoder, CAPTURE_BATCH), progress=False)
        for conversations in groups.values()
    ]
    return kore.merge_covariance(sets, weights=[1 / captured.tokens(captured.modules[0]) for captured in sets])
