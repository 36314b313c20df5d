"""Ask a model questions by batched greedy generation and mark the answers.

Answers are written to ``answers.jsonl`` as they come, so a killed run goes on where it stopped; ``scores.json``
is written last and marks the result as complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kore.artifacts import atomic_write, read_json
from kore.errors import ArtifactError, DataError
from kore.metrics import cover_exact_match, f1, knowledge_adaptation

if TYPE_CHECKING:
    import torch

    from kore.data import Encoder
    from kore.data.types import Question

ANSWERS, SCORES, STATE = "answers.jsonl", "scores.json", "state.json"
_WEIGHT_SAMPLES = 16


@dataclass(frozen=True)
class Answer:
    """One question, what the model said, and its marks (fractions)."""

    index: int
    question_id: str
    type: str
    image: str | None
    question: str
    answer: str | list[str]
    prediction: str
    cem: float
    f1: float


@dataclass(frozen=True)
class Score:
    """Means over ``count`` questions, in percent."""

    count: int
    cem: float
    f1: float

    @property
    def mean(self) -> float:
        """Mean of CEM and F1: K.A when the questions ask for new knowledge."""
        return knowledge_adaptation(self.cem, self.f1)

    @classmethod
    def of(cls, answers: Iterable[Answer]) -> Score:
        answers = list(answers)
        count = len(answers)
        return cls(count, 100 * sum(a.cem for a in answers) / count, 100 * sum(a.f1 for a in answers) / count)


@dataclass(frozen=True)
class EvalResult:
    """Scores over all questions and by question type (in percent), and the answers in the order asked."""

    overall: Score
    by_type: dict[str, Score]
    answers: list[Answer]

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> EvalResult:
        types = sorted({answer.type for answer in answers})
        by_type = {one: Score.of(answer for answer in answers if answer.type == one) for one in types}
        return cls(Score.of(answers), by_type, list(answers))

    def scores(self) -> dict[str, Any]:
        """The scores as JSON-serialisable values."""
        return {"overall": asdict(self.overall), "by_type": {name: asdict(s) for name, s in self.by_type.items()}}


def evaluate(
    model: torch.nn.Module,
    encoder: Encoder,
    questions: Sequence[Question],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 32,
    output: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> EvalResult:
    """Answer every question greedily and mark the answers with CEM and F1.

    Questions of similar length share a batch, padded on the left. The batch size does not change an answer,
    except where two tokens are equally likely to the precision of the model's dtype.

    Args:
        model: A Hugging Face or PEFT model that can ``generate``; its training mode is restored afterwards.
        encoder: Turns a question into the model's inputs.
        questions: At least one question.
        batch_size: Questions answered at a time.
        max_new_tokens: Longest answer.
        output: A directory for ``answers.jsonl`` and ``scores.json``. Answers found there are kept when they
            come from the same weights, questions and settings, and are replaced otherwise.
        progress: Show a progress bar on a terminal.

    Raises:
        DataError: No questions, or two questions with the same question_id.
    """
    if not questions:
        raise DataError("evaluation: expected at least one question, got none")
    ids = [question.question_id for question in questions]
    if len(set(ids)) < len(ids):
        twice = next(one for one in ids if ids.count(one) > 1)
        raise DataError(f"evaluation: two questions have the question_id {twice!r}; give each its own")
    store = _Store(output, _state(model, questions, max_new_tokens)) if output is not None else None
    done = store.answers(questions) if store else {}
    for answer in _generate(model, encoder, questions, done, batch_size, max_new_tokens, progress):
        if store:
            store.append(answer)
        for one in answer:
            done[one.index] = one
    result = EvalResult.of([done[index] for index in range(len(questions))])
    if store:
        store.finish(result)
    return result


def load_result(directory: str | os.PathLike[str]) -> EvalResult:
    """Read a finished evaluation. Raises ArtifactError naming the file when it is missing or broken."""
    directory = Path(directory)
    read_json(directory / SCORES)
    try:
        lines = (directory / ANSWERS).read_text(encoding="utf-8").split("\n")
        return EvalResult.of([Answer(**json.loads(line)) for line in lines if line])
    except (OSError, ValueError, TypeError, ZeroDivisionError) as error:
        raise ArtifactError(f"{directory / ANSWERS}: cannot be read ({error}); evaluate again") from None


def _generate(
    model: Any,
    encoder: Encoder,
    questions: Sequence[Question],
    done: dict[int, Answer],
    batch_size: int,
    max_new_tokens: int,
    progress: bool,
) -> Iterator[list[Answer]]:
    import torch

    settings = _generation_config(model, encoder, max_new_tokens)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for indices in _batches(questions, done, batch_size, progress):
            examples = [encoder.encode(questions[i].conversation(), part="prompt") for i in indices]
            batch = encoder.collate(examples, padding_side="left")
            batch = {name: value.to(device) for name, value in batch.items() if name != "labels"}
            with torch.no_grad():
                tokens = model.generate(**batch, generation_config=settings)
            prompt = batch["input_ids"].shape[1]
            yield [_mark(i, questions[i], encoder.decode(row[prompt:])) for i, row in zip(indices, tokens)]
    finally:
        model.train(was_training)


def _batches(
    questions: Sequence[Question], done: dict[int, Answer], batch_size: int, progress: bool
) -> Iterator[list[int]]:
    from rich.console import Console
    from rich.progress import track

    left = [index for index in range(len(questions)) if index not in done]
    left.sort(key=lambda index: (questions[index].image is None, len(questions[index].text), index))
    batches = [left[start : start + batch_size] for start in range(0, len(left), batch_size)]
    console = Console(stderr=True)
    quiet = not progress or not console.is_terminal
    return iter(track(batches, "answering", console=console, disable=quiet, transient=True))


def _generation_config(model: Any, encoder: Encoder, max_new_tokens: int) -> Any:
    """Plain greedy decoding; a checkpoint's own sampling and repetition settings are left out."""
    from transformers import GenerationConfig

    ends: set[int] = set()
    for value in (getattr(model.generation_config, "eos_token_id", None), encoder.tokenizer.eos_token_id):
        ends.update([value] if isinstance(value, int) else value or [])
    pad = encoder.tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad if pad is not None else min(ends, default=0),
    )


def _mark(index: int, question: Question, prediction: str) -> Answer:
    accepted = question.answer if isinstance(question.answer, str) else list(question.answer)
    return Answer(
        index=index,
        question_id=question.question_id,
        type=question.type,
        image=None if question.image is None else str(question.image),
        question=question.text,
        answer=accepted,
        prediction=prediction.strip(),
        cem=float(cover_exact_match(prediction, accepted)),
        f1=f1(prediction, accepted),
    )


def _state(model: torch.nn.Module, questions: Sequence[Question], max_new_tokens: int) -> dict[str, Any]:
    """What the answers depend on: the weights (a few samples of every tensor), the questions, the settings."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if tensor.numel() and not tensor.is_meta:
            flat = tensor.detach().flatten()
            index = torch.linspace(0, flat.numel() - 1, _WEIGHT_SAMPLES, dtype=torch.float64).long()
            digest.update(str(flat[index.to(flat.device)].double().tolist()).encode())
    asked = hashlib.sha256(json.dumps([[q.question_id, str(q.image), q.text, q.answer] for q in questions]).encode())
    return {"weights": digest.hexdigest(), "questions": asked.hexdigest(), "max_new_tokens": max_new_tokens}


class _Store:
    """The answers on disk."""

    def __init__(self, output: str | os.PathLike[str], state: dict[str, Any]) -> None:
        self.directory = Path(output)
        self.directory.mkdir(parents=True, exist_ok=True)
        if not (self.directory / STATE).is_file() or read_json(self.directory / STATE) != state:
            for name in (SCORES, ANSWERS):
                (self.directory / name).unlink(missing_ok=True)
            atomic_write(self.directory / STATE, json.dumps(state, indent=2) + "\n")

    def answers(self, questions: Sequence[Question]) -> dict[int, Answer]:
        """The answers that are there; a line cut short by a kill is dropped from the file."""
        file, found = self.directory / ANSWERS, {}
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.is_file() else []
        for line in lines:
            try:
                answer = Answer(**json.loads(line))
            except (ValueError, TypeError):
                continue
            if 0 <= answer.index < len(questions):
                found[answer.index] = answer
        self._write(found.values())
        return found

    def append(self, answers: list[Answer]) -> None:
        with open(self.directory / ANSWERS, "a", encoding="utf-8") as file:
            file.write("".join(_line(answer) for answer in answers))
            file.flush()
            os.fsync(file.fileno())

    def finish(self, result: EvalResult) -> None:
        self._write(result.answers)
        atomic_write(self.directory / SCORES, json.dumps(result.scores(), indent=2) + "\n")

    def _write(self, answers: Iterable[Answer]) -> None:
        atomic_write(self.directory / ANSWERS, "".join(_line(answer) for answer in answers))


def _line(answer: Answer) -> str:
    return json.dumps(asdict(answer), ensure_ascii=False) + "\n"
