"""What each of the processes that evaluate together does in ``test_evaluation_processes``."""

from __future__ import annotations

import json
import os
import signal
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from kore.data import Encoder, Question
from kore.errors import KoreError
from kore.evaluation import evaluate
from kore.evaluation.results import Store
from kore.models import load_model


def questions(images: Path, count: int = 11) -> list[Question]:
    """Of differing lengths, some without an image."""
    return [
        Question(
            f"q{i}", images / f"{i % 4}.png" if i % 3 else None, "What is the colour?" * (1 + i % 4), "red", f"t{i % 2}"
        )
        for i in range(count)
    ]


def work(rank: int, count: int, store: Path, folder: Path, output: str, dies_after: int | None, case: str) -> None:
    """Evaluate as process ``rank`` of ``count``; ``dies_after`` batches the process kills itself.

    The ids that were asked go to ``asked-{output}-{rank}.json``.
    """
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), count), rank=rank, world_size=count, timeout=timedelta(seconds=60)
    )
    model, encoder = load_model(folder / "model", device="cpu"), Encoder.from_pretrained(folder / "model")
    asked: list[str] = []
    append, written = Store.append, []

    def counting(self, answers):
        append(self, answers)
        asked.extend(answer.question_id for answer in answers)
        written.append(len(answers))
        if len(written) == dies_after:
            os.kill(os.getpid(), signal.SIGKILL)

    Store.append = counting
    given = questions(folder / "images")
    if case == "another model" and rank:
        next(model.parameters()).data.add_(1)
    if case == "bad image" and rank:
        encode = Encoder.encode

        def broken(self, *arguments, **options):
            raise KoreError("no such picture")

        Encoder.encode = broken if rank == 1 else encode
    try:
        result = evaluate(model, encoder, given, batch_size=2, max_new_tokens=3, output=folder / output, progress=False)
        said = {"answers": [answer.prediction for answer in result.answers]}
    except KoreError as error:
        said = {"error": str(error)}
    (folder / f"{output}-{rank}.json").write_text(json.dumps({**said, "asked": asked}))
    dist.destroy_process_group()
