"""The shipped small model: where it is, what its recipe says, and how well it does the old tasks."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kore.errors import ArtifactError

CHECKPOINT = Path(__file__).parent / "checkpoint"
RECIPE = "recipe.json"
MAX_NEW_TOKENS = 24


def weights_hash(directory: Path) -> str:
    """sha256 of the checkpoint's weights."""
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def checked_checkpoint(directory: Path = CHECKPOINT) -> tuple[Path, dict[str, Any]]:
    """The checkpoint directory and its recipe.

    Raises:
        ArtifactError: It is missing, or the weights are not those the recipe names.
    """
    try:
        recipe = json.loads((directory / RECIPE).read_text(encoding="utf-8"))
        found = weights_hash(directory)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{directory}: the demo's checkpoint cannot be read ({error})") from error
    if recipe["sha256"] != found:
        raise ArtifactError(
            f"{directory}: expected weights with sha256 {recipe['sha256'][:12]}…, got {found[:12]}…; reinstall, "
            "or make them again with python -m kore.demo.pretrain"
        )
    return directory, recipe


def exact_match(answers: Iterable[Any]) -> dict[str, float]:
    """Share of answers by type that are the expected one, word for word (case and punctuation aside)."""
    from kore.metrics import normalize_answer

    marks: dict[str, list[bool]] = {}
    for answer in answers:
        right = normalize_answer(answer.prediction) == normalize_answer(answer.answer)
        marks.setdefault(answer.type, []).append(right)
    return {task: sum(values) / len(values) for task, values in marks.items()}


def old_accuracy(directory: Path, split: str, per_task: int = 64) -> dict[str, float]:
    """Exact match of a model directory on every old task, over fresh questions of a split."""
    import kore
    from kore.data import Encoder, load_questions
    from kore.demo.files import write_questions
    from kore.demo.world.old import old_items

    model = kore.load_model(directory, dtype="float32", device="cpu")
    encoder = Encoder.from_pretrained(directory)
    with tempfile.TemporaryDirectory() as scratch:
        file = write_questions(old_items(split, per_task), Path(scratch) / "old.jsonl")
        answers = kore.evaluate(
            model, encoder, load_questions(file), batch_size=128, max_new_tokens=MAX_NEW_TOKENS, progress=False
        ).answers
    return {task: round(share, 4) for task, share in exact_match(answers).items()}
