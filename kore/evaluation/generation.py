"""Batched greedy generation of answers, shared by the processes of a ``torch.distributed`` job."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from kore.errors import ConfigError, DataError, KoreError
from kore.evaluation.decoding import continuations, positions
from kore.evaluation.measures import Measures
from kore.evaluation.results import Answer, EvalResult, LeftOut, Store
from kore.metrics import CemRule, F1Rule

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from kore.data import Encoder
    from kore.data.types import Question
    from kore.evaluation.prompts import ProcessorPrompts

_log = logging.getLogger(__name__)
_WEIGHT_SAMPLES = 16


def evaluate(
    model: torch.nn.Module,
    encoder: Encoder | ProcessorPrompts,
    questions: Sequence[Question],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 32,
    output: str | os.PathLike[str] | None = None,
    progress: bool = True,
    cem: CemRule = "vqa",
    f1: F1Rule = "multiset",
    on_bad_question: Literal["fail", "skip"] = "fail",
    distributed: ProcessGroup | bool | None = None,
) -> EvalResult:
    """Answer every question greedily and mark the answers with CEM and F1.

    Questions of similar length share a batch, padded on the left. The batch size does not change an answer,
    except where two tokens are equally likely to the precision of the model's dtype. Which questions share a batch
    depends on neither the number of processes nor on where an earlier run stopped, so neither changes an answer.

    Args:
        model: A Hugging Face or PEFT model that can ``generate``; its training mode is restored afterwards.
        encoder: Turns a question into the model's inputs: an :class:`kore.data.Encoder`, or for a family that it does
            not know :class:`kore.evaluation.ProcessorPrompts`. :func:`kore.evaluation.load_prompts` takes what fits.
        questions: At least one question, the same in all processes.
        batch_size: Questions answered at a time in each process.
        max_new_tokens: Longest answer.
        output: A directory for ``answers.jsonl`` and ``scores.json``, seen by all processes. Answers found there are
            kept when they come from the same weights, questions and ``max_new_tokens``, and are replaced otherwise;
            they are marked anew.
        progress: Show a progress bar on a terminal.
        cem: How texts are compared for CEM, see :func:`kore.metrics.cover_exact_match`.
        f1: The form of F1, see :func:`kore.metrics.f1`.
        on_bad_question: ``"skip"`` leaves out a question that cannot be asked and says so in ``scores.json``; it
            is tried again by the next call.
        distributed: Processes that share the questions, each with the same model: None for those of
            ``torch.distributed`` where it is initialised, a process group, or False for this process alone.

    Returns:
        The result over all questions, in every process.

    Raises:
        DataError: No questions, two with the same question_id, or one that cannot be asked: its image cannot be
            read, or its prompt is longer than the encoder or the model allows. Finished answers are kept.
        KoreError: Another process failed, or has another model or other questions.
    """
    from kore.distributed import Processes

    measures = Measures(cem, f1)
    _check(questions, batch_size, max_new_tokens, on_bad_question)
    processes = Processes(distributed)
    store = Store(output, processes.rank) if output is not None else None
    state = _state(model, questions, max_new_tokens)
    if any(other != state for other in processes.share(state)):
        raise KoreError("evaluation: the processes have different models, questions or settings; give all the same")
    done: dict[int, str] = {}
    with processes.fail_together("the evaluation"):
        if store and processes.rank == 0:
            done = store.open(state, len(questions))
    known = set(processes.share(set(done))[0])
    batches = [[i for i in batch if i not in known] for batch in _batches(questions, batch_size)]
    mine = [batch for batch in batches if batch][processes.rank :: processes.count]
    said: dict[int, str] = {}
    bad: dict[int, str] = {}
    with processes.fail_together("the evaluation"):
        mine = _askable(model, encoder, questions, mine, max_new_tokens, on_bad_question, bad)
        shown = progress and processes.rank == 0
        for new in _generate(model, encoder, questions, mine, max_new_tokens, on_bad_question, bad, shown):
            if store:
                store.append([Answer.of(i, questions[i], prediction, measures) for i, prediction in new.items()])
            said |= new
    for predictions, reasons in processes.share((said, bad)):
        done |= predictions
        bad |= reasons
    result = _result(questions, processes.share(done if processes.rank == 0 else None)[0], bad, measures)
    with processes.fail_together("the evaluation"):
        if store and processes.rank == 0:
            store.finish(result)
    return result


def _check(questions: Sequence[Question], batch_size: int, max_new_tokens: int, on_bad_question: str) -> None:
    if not questions:
        raise DataError("evaluation: expected at least one question, got none")
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ConfigError(f"evaluation: {name}: expected at least 1, got {value}")
    if on_bad_question not in ("fail", "skip"):
        raise ConfigError(f"evaluation: on_bad_question: expected fail or skip, got {on_bad_question!r}")
    seen: set[str] = set()
    for question in questions:
        if question.question_id in seen:
            raise DataError(
                f"evaluation: two questions have the question_id {question.question_id!r}; give each its own"
            )
        seen.add(question.question_id)


def _batches(questions: Sequence[Question], batch_size: int) -> list[list[int]]:
    """All questions, those with and without image apart, those of similar length together."""
    batches = []
    for with_image in (True, False):
        order = [i for i, question in enumerate(questions) if (question.image is not None) == with_image]
        order.sort(key=lambda i: (len(questions[i].text), i))
        batches += [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return batches


def _askable(
    model: Any,
    encoder: Encoder | ProcessorPrompts,
    questions: Sequence[Question],
    batches: list[list[int]],
    max_new_tokens: int,
    on_bad_question: str,
    bad: dict[int, str],
) -> list[list[int]]:
    """The batches without questions whose prompt does not fit, told by the headers of images before anything is asked.

    ``bad`` gets the reasons of those left out.
    """
    room = positions(model)
    kept = []
    for batch in batches:
        good = []
        for index in batch:
            try:
                _check_length(encoder, questions[index], room, max_new_tokens)
                good.append(index)
            except DataError as error:
                _refuse(index, error, on_bad_question, bad)
        kept.append(good)
    return [batch for batch in kept if batch]


def _check_length(
    encoder: Encoder | ProcessorPrompts, question: Question, room: int | None, max_new_tokens: int
) -> None:
    where = question.source or f"question {question.question_id!r}"
    tokens = encoder.measure(question.conversation(), part="prompt")
    length = len(tokens.ids)
    if tokens.cut:
        raise DataError(
            f"{where}: the prompt has {length + tokens.cut} tokens, the encoder's max_length is {encoder.max_length}; "
            "shorten the question or raise max_length"
        )
    if room is not None and length + max_new_tokens > room:
        raise DataError(
            f"{where}: the prompt has {length} tokens and the answer up to {max_new_tokens}, the model has room for "
            f"{room} in all; shorten the question, or take a smaller image or max_new_tokens"
        )


def _refuse(index: int, error: DataError, on_bad_question: str, bad: dict[int, str]) -> None:
    if on_bad_question == "fail":
        raise DataError(f"{error}; with skip in place of fail such questions are left out") from error.__cause__
    _log.warning("left out: %s", error)
    bad[index] = str(error)


def _generate(
    model: Any,
    encoder: Encoder | ProcessorPrompts,
    questions: Sequence[Question],
    batches: Sequence[Sequence[int]],
    max_new_tokens: int,
    on_bad_question: str,
    bad: dict[int, str],
    progress: bool,
) -> Iterator[dict[int, str]]:
    was_training = model.training
    model.eval()
    try:
        for batch in _tracked(batches, progress):
            examples = _encoded(encoder, questions, batch, on_bad_question, bad)
            if not examples:
                continue
            inputs = encoder.collate(list(examples.values()), padding_side="left")
            said = continuations(model, encoder, inputs, max_new_tokens)
            yield {i: text.strip() for i, text in zip(examples, said)}
    finally:
        model.train(was_training)


def _encoded(
    encoder: Encoder | ProcessorPrompts,
    questions: Sequence[Question],
    batch: Sequence[int],
    on_bad_question: str,
    bad: dict[int, str],
) -> dict[int, Any]:
    examples = {}
    for index in batch:
        try:
            examples[index] = encoder.encode(questions[index].conversation(), part="prompt")
        except DataError as error:
            _refuse(index, error, on_bad_question, bad)
    return examples


def _tracked(batches: Sequence[Sequence[int]], progress: bool) -> Iterator[Sequence[int]]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    quiet = not progress or not console.is_terminal
    return iter(track(batches, "answering", console=console, disable=quiet, transient=True))


def _result(
    questions: Sequence[Question], said: Mapping[int, str], bad: Mapping[int, str], measures: Measures
) -> EvalResult:
    answers = [Answer.of(index, questions[index], said[index], measures) for index in sorted(said)]
    if not answers:
        raise DataError(f"evaluation: no question could be asked; the first problem: {bad[min(bad)]}")
    left_out = [LeftOut(questions[index].question_id, bad[index]) for index in sorted(bad)]
    return EvalResult.of(answers, measures, left_out)


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
    rows = [[q.question_id, str(q.image), q.text, q.answer, *q.history] for q in questions]
    asked = hashlib.sha256(json.dumps(rows).encode())
    return {"weights": digest.hexdigest(), "questions": asked.hexdigest(), "max_new_tokens": max_new_tokens}
