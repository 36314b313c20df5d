"""One cell of the reproduction: a row of a table, trained and asked in one world."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kore.artifacts import atomic_write
from kore.reproduce import inputs
from kore.reproduce.prepare import World
from kore.reproduce.settings import Setting
from kore.reproduce.studies import Row

PROJECTOR_RATE = 2e-5
CELL = "cell.json"


@dataclass(frozen=True)
class Budget:
    """What every method is given alike.

    Attributes:
        steps: Of training.
        batch_size: Conversations in a step.
    """

    steps: int = 120
    batch_size: int = 10


FULL = Budget()
QUICK = Budget(steps=60)


@dataclass(frozen=True)
class Job:
    """A cell to run, as it travels to a process.

    Attributes:
        row: What is compared.
        world: On what.
        setting: Learning rate and strength.
        directory: Where the cell writes.
        seed: Of the training.
        budget: Steps and batch.
        split: Whose questions are asked.
    """

    row: Row
    world: World
    setting: Setting
    directory: Path
    seed: int = 0
    budget: Budget = FULL
    split: str = "test"

    def key(self) -> dict[str, Any]:
        """What the result depends on."""
        files = [inputs.data_file(self.world, self.row.data), self.world.new_questions[self.split],
                 self.world.old_questions[self.split], *self.world.old_groups.values()]  # fmt: skip
        return {
            **self.row.identity(),
            **asdict(self.budget),
            "learning_rate": self.setting.learning_rate,
            "strength": self.setting.strength_of(self.row),
            "world": self.world.world,
            "draw": self.world.draw,
            "seed": self.seed,
            "split": self.split,
            "checkpoint": self.world.about["sha256"],
            "data_sha256": _sha256(files),
        }


def _sha256(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def finished(job: Job) -> dict[str, Any] | None:
    """The cell where the same one is finished."""
    done = job.directory / CELL
    try:
        cell: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return cell if cell.get("key") == json.loads(json.dumps(job.key())) else None


def run(job: Job) -> dict[str, Any]:
    """The cell, in this process on one thread, or as it was finished before; ``cell.json`` is written last.

    Returns the marks, the loss history, the number of trained parameters and the core-seconds of every stage.
    """
    import torch

    from kore.demo.comparison import quiet_libraries

    known = finished(job)
    if known is not None:
        return known
    torch.set_num_threads(1)
    quiet_libraries()
    shutil.rmtree(job.directory, ignore_errors=True)
    started = time.perf_counter(), time.process_time()
    model, data, penalty = prepare(job)
    prepared = time.process_time()
    result = train(model, data, penalty, job)
    trained = time.process_time()
    new, old = inputs.ask(result.model, job.world, job.split, job.directory)
    cell = {
        "key": job.key(),
        "row": job.row.id,
        "tuned": job.setting.tuned,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "conversations": len(data),
        **inputs.marks(new, old),
        "history": result.history,
        "seconds": time.perf_counter() - started[0],
        "core_seconds": {
            "prepare": prepared - started[1],
            "train": trained - prepared,
            "ask": time.process_time() - trained,
        },
    }
    shutil.rmtree(job.directory / "train", ignore_errors=True)
    atomic_write(job.directory / CELL, json.dumps(cell, indent=1))
    return cell


def prepare(job: Job) -> tuple[Any, list[Any], Any]:
    """The trainable model, its data and what is added to the loss."""
    import kore
    from kore.baselines import Preparation, baseline

    row, world = job.row, job.world
    sha256 = world.about["sha256"]
    strength = job.setting.strength_of(row)
    own = {"strength": strength} if strength is not None and not row.two_sided else {}
    method = baseline(row.method, **row.options, **own)
    cov = gradients = None
    if method.reads_covariance or method.penalty_reads_covariance or row.two_sided or not method.trains_a:
        folder = inputs.captured(world)
        cov = inputs.merged(folder, inputs.COVARIANCE, row.merge, row.groups, sha256)
        if row.two_sided:
            gradients = inputs.merged(folder, inputs.GRADIENTS, row.merge, row.groups, sha256)
    how = Preparation(cov=cov, rank=row.rank, seed=job.seed, train_a=row.train_a, progress=False)
    model = method.prepare(inputs.load_start(world.checkpoint), how)
    old = inputs.old_conversations(world)
    data = method.conversations(inputs.conversations(inputs.data_file(world, row.data)), old, job.seed)
    if gradients is not None and strength is not None and cov is not None:
        return model, data, kore.two_sided(model, cov, gradients, strength)
    return model, data, method.penalty(model, inputs.encoder_of(world), old, cov)


def train(model: Any, data: list[Any], penalty: Any, job: Job) -> Any:
    """kore.train with the settings that every row has."""
    import kore

    config = kore.TrainConfig(
        learning_rate=job.setting.learning_rate,
        projector_learning_rate=PROJECTOR_RATE,
        max_steps=job.budget.steps,
        batch_size=job.budget.batch_size,
        warmup_ratio=0.03,
        logging_steps=max(1, job.budget.steps // 20),
        report_to=[],
        save_steps=None,
        progress=False,
        seed=job.seed,
    )
    encoder = inputs.encoder_of(job.world)
    return kore.train(model, encoder, data, config, job.directory / "train", resume=False, penalty=penalty)
