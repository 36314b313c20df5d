"""One cell of the comparison: prepare the model, train it, ask the old and the new questions."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from kore.artifacts import atomic_write
from kore.demo.checkpoint import MAX_NEW_TOKENS, exact_match
from kore.demo.methods import PROJECTOR_RATE, Budget, Method

EVALUATION_BATCH = 128


@dataclass(frozen=True)
class Inputs:
    """What cells share: the checkpoint, the encoder, the covariance, the data and the questions."""

    checkpoint: Path
    checkpoint_sha256: str
    encoder: Any
    covariance: Any
    augmented: Any
    plain: Any
    new_questions: Any
    old_questions: Any


def load_start(checkpoint: Path) -> Any:
    """A fresh copy of the shipped model in float32 on the CPU."""
    import kore

    return kore.load_model(checkpoint, dtype="float32", device="cpu")


def ask(model: Any, encoder: Any, questions: Any, output: Path | None = None) -> Any:
    """kore.evaluate with the demo's settings."""
    import kore

    return kore.evaluate(
        model,
        encoder,
        questions,
        batch_size=EVALUATION_BATCH,
        max_new_tokens=MAX_NEW_TOKENS,
        output=output,
        progress=False,
    )


def marks(new: Any, old: Any) -> dict[str, Any]:
    """K.A (mean of CEM and F1) over the new questions, K.R (mean exact match of the old tasks), in percent."""
    from kore.metrics import average, knowledge_retention

    tasks = {task: 100 * share for task, share in exact_match(old.answers).items()}
    ka, kr = new.overall.mean, knowledge_retention(tasks)
    return {
        "ka": ka,
        "kr": kr,
        "avg": average(ka, kr),
        "cem": new.overall.cem,
        "f1": new.overall.f1,
        "old_tasks": tasks,
        "new_facts": {kind: score.mean for kind, score in new.by_type.items()},
    }


def training_settings(learning_rate: float, budget: Budget) -> dict[str, Any]:
    """Fields of kore.TrainConfig that every method is given, and its learning rate."""
    return {
        "learning_rate": learning_rate,
        "projector_learning_rate": PROJECTOR_RATE,
        "max_steps": budget.steps,
        "batch_size": budget.batch_size,
        "warmup_ratio": 0.03,
        "logging_steps": max(1, budget.steps // 30),
    }


def run_cell(
    method: Method, inputs: Inputs, learning_rate: float, seed: int, budget: Budget, directory: Path
) -> dict[str, Any]:
    """Train and ask one method; writes `cell.json` last, and returns it at once when it is there for the same key.

    Returns the marks, the loss history, the number of trained parameters and the seconds it took.
    """
    from kore import baselines

    key = {**budget.as_dict(), "method": method.prepare, "augmented": method.augmented, "rank": str(method.rank),
           "learning_rate": learning_rate, "seed": seed, "checkpoint": inputs.checkpoint_sha256}  # fmt: skip
    done = directory / "cell.json"
    if done.is_file():
        cell = json.loads(done.read_text(encoding="utf-8"))
        if cell["key"] == key:
            return {**cell, "skipped": True}
    started = time.perf_counter()
    model = baselines.prepare_model(
        load_start(inputs.checkpoint),
        method.prepare,
        inputs.covariance if method.prepare == "kore" else None,
        rank=method.rank,
        seed=seed,
        progress=False,
    )
    data = inputs.augmented if method.augmented else inputs.plain
    prepared = time.perf_counter() - started
    cell = {"key": key, **train_and_ask(model, inputs, data, learning_rate, seed, budget, directory)}
    cell["train_seconds"] += prepared
    atomic_write(done, json.dumps(cell, indent=1))
    return cell


def train_and_ask(
    model: Any,
    inputs: Inputs,
    data: Any,
    learning_rate: float,
    seed: int,
    budget: Budget,
    directory: Path,
    penalty: Any = None,
) -> dict[str, Any]:
    """Train a prepared model on ``data`` and ask it all questions; what a cell holds, without its key.

    Args:
        penalty: A penalty for :func:`kore.train`.
    """
    import kore

    started = time.perf_counter()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config = kore.TrainConfig(
        **training_settings(learning_rate, budget), report_to=[], save_steps=None, progress=False, seed=seed
    )
    result = kore.train(model, inputs.encoder, data, config, directory / "train", resume=False, penalty=penalty)
    trained = time.perf_counter()
    new = ask(result.model, inputs.encoder, inputs.new_questions, directory / "new")
    old = ask(result.model, inputs.encoder, inputs.old_questions, directory / "old")
    return {
        "trainable": trainable,
        **marks(new, old),
        "history": result.history,
        "train_seconds": trained - started,
        "eval_seconds": time.perf_counter() - trained,
    }


def run_in_worker(
    method: Method,
    inputs: Inputs,
    learning_rate: float,
    seed: int,
    budget: Budget,
    directory: Path,
    covariance: Path,
) -> dict[str, Any]:
    """:func:`run_cell` in a process of its own, on one thread; its encoder and covariance are loaded here, once."""
    import torch

    from kore.demo.comparison import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()
    inputs = replace(inputs, encoder=_encoder(inputs.checkpoint), covariance=_covariance(covariance))
    return run_cell(method, inputs, learning_rate, seed, budget, directory)


@lru_cache(maxsize=1)
def _encoder(checkpoint: Path) -> Any:
    from kore.demo.encoding import CachedEncoder

    return CachedEncoder.from_pretrained(checkpoint)


@lru_cache(maxsize=1)
def _covariance(directory: Path) -> Any:
    import kore

    return kore.load_covariance(directory)
