"""Answers for an evaluation engine: a model with its adapter, asked in batches, greedily.

An engine hands over prompts of any number of turns and images. Nothing is cut silently: limits of the answer are those
that the engine's task asks for, as far as the model has positions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kore.data.types import IMAGE_MARK, Conversation, Message
from kore.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

_log = logging.getLogger(__name__)
_LEAST_ROOM = 32


@dataclass(frozen=True)
class Prompt:
    """What is asked.

    Attributes:
        name: For error messages.
        messages: Turns, the last of the user; ``<image>`` marks the places of the images.
        images: Gives the images in order; called when it is this prompt's turn, so that few are in memory.
        max_new_tokens: Longest answer.
        stops: Texts that end an answer and are left out of it.
    """

    name: str
    messages: tuple[Message, ...]
    images: Callable[[], Sequence[Image | Path]]
    max_new_tokens: int
    stops: tuple[str, ...] = ()


class Journal:
    """Answers on disk by what was asked, so that a killed benchmark asks nothing twice. One process writes."""

    def __init__(self, file: str | os.PathLike[str] | None) -> None:
        self.file = None if file is None else Path(file)
        self._known: dict[str, str] = {}
        if self.file is not None and self.file.is_file():
            text = self.file.read_bytes()
            whole = text[: text.rfind(b"\n") + 1]
            if len(whole) < len(text):  # a line cut short by a kill
                self.file.write_bytes(whole)
            for line in whole.decode("utf-8", errors="replace").split("\n"):
                try:
                    row = json.loads(line)
                    self._known[row["key"]] = row["answer"]
                except (ValueError, KeyError, TypeError):
                    continue

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> str | None:
        return self._known.get(key)

    def add(self, rows: Sequence[tuple[str, str, str]]) -> None:
        """(key, name, answer) of each."""
        self._known.update((key, answer) for key, _, answer in rows)
        if self.file is None or not rows:
            return
        lines = [json.dumps({"key": k, "name": n, "answer": a}, ensure_ascii=False) + "\n" for k, n, a in rows]
        with open(self.file, "a", encoding="utf-8") as file:
            file.write("".join(lines))
            file.flush()


class Answerer:
    """A model that answers :class:`Prompt` in batches.

    Args:
        pretrained: Model directory or hub id.
        adapter: Directory of a PEFT or KORE adapter, loaded beside the model and not merged.
        dtype: As :func:`kore.models.load_model`.
        device: The same.
        batch_size: Prompts answered at a time.
        journal: A file that keeps the answers.
        max_new_tokens: A limit on what tasks ask for; None leaves theirs.
    """

    def __init__(
        self,
        pretrained: str,
        adapter: str | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        batch_size: int = 1,
        journal: str | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        from kore.evaluation import load_prompts
        from kore.evaluation.decoding import positions
        from kore.models import load_model

        if batch_size < 1:
            raise ConfigError(f"batch_size: expected at least 1, got {batch_size}")
        self.encoder: Any = load_prompts(pretrained)
        self.model: Any = load_model(pretrained, dtype=dtype, device=device)
        if adapter:
            from kore.adapter import load_adapter

            self.model = load_adapter(self.model, adapter).eval()
        self.batch_size = batch_size
        self.journal = Journal(journal)
        self.max_new_tokens = max_new_tokens
        self._room = positions(self.model)
        self._warned = 0

    def answer(self, prompts: Sequence[Prompt]) -> Iterator[dict[int, str]]:
        """Answers by index of the prompt, batch by batch; prompts of similar length and one limit share a batch.

        Raises:
            DataError: A prompt cannot be asked; the message names it.
        """
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for index, prompt in enumerate(prompts):
            groups.setdefault((prompt.max_new_tokens, prompt.stops), []).append(index)
        for (limit, stops), members in groups.items():
            members.sort(key=lambda i: sum(len(message.text) for message in prompts[i].messages))
            for start in range(0, len(members), self.batch_size):
                yield self._batch(prompts, members[start : start + self.batch_size], limit, stops)

    def _batch(self, prompts: Sequence[Prompt], chosen: Sequence[int], limit: int, stops: tuple[str, ...]) -> Any:
        if self.max_new_tokens is not None:
            limit = min(limit, self.max_new_tokens)
        known: dict[int, str] = {}
        keys: dict[int, str] = {}
        examples: dict[int, Any] = {}
        with tempfile.TemporaryDirectory(prefix="kore-images-") as scratch:
            for index in chosen:
                prompt = prompts[index]
                files, digests = _files(prompt, Path(scratch) / str(index))
                turns = [[message.role, message.text] for message in prompt.messages]
                asked = json.dumps([turns, digests, limit, stops]).encode()
                keys[index] = hashlib.sha256(asked).hexdigest()
                answer = self.journal.get(keys[index])
                if answer is not None:
                    known[index] = answer
                    continue
                messages = (*_marked(prompt, len(files)), Message("assistant", ""))
                conversation = Conversation(prompt.name, tuple(files), messages, prompt.name)
                examples[index] = self.encoder.encode(conversation, part="prompt")
        if examples:
            said = self._generate(examples, limit, stops)
            self.journal.add([(keys[index], prompts[index].name, answer) for index, answer in said.items()])
            known |= said
        return known

    def _generate(self, examples: dict[int, Any], limit: int, stops: tuple[str, ...]) -> dict[int, str]:
        from kore.evaluation.decoding import continuations

        inputs = self.encoder.collate(list(examples.values()), padding_side="left")
        limit = self._within(inputs["input_ids"].shape[1], limit)
        said = continuations(self.model, self.encoder, inputs, limit, stops)
        return {index: _cut(text, stops) for index, text in zip(examples, said)}

    def _within(self, length: int, limit: int) -> int:
        """As many tokens as the model has positions for; where the prompt alone fills them, a short answer."""
        if self._room is None or length + limit <= self._room:
            return limit
        allowed = min(limit, max(self._room - length, _LEAST_ROOM))
        self._warned += 1
        if self._warned <= 3:
            _log.warning(
                "a prompt of %d tokens leaves %d of %d for the answer, %d of the %d positions of the model in all",
                length, allowed, limit, length + allowed, self._room,
            )  # fmt: skip
        return allowed


def _files(prompt: Prompt, folder: Path) -> tuple[list[Path], list[str]]:
    """The images as files, and what tells their content apart."""
    files, digests = [], []
    for number, image in enumerate(prompt.images()):
        if isinstance(image, str | os.PathLike):
            path = Path(image)
            if not path.is_file():
                raise DataError(f"{prompt.name}: image {path}: no such file")
            files.append(path)
            digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
            continue
        if not hasattr(image, "convert"):
            raise DataError(
                f"{prompt.name}: expected images, found {type(image).__name__}; video and sound are not asked"
            )
        folder.mkdir(exist_ok=True)
        files.append(folder / f"{number}.png")
        plain = image.convert("RGB")
        plain.save(files[-1], compress_level=1)
        digests.append(hashlib.sha256(f"{plain.size}".encode() + plain.tobytes()).hexdigest())
    return files, digests


def _marked(prompt: Prompt, images: int) -> tuple[Message, ...]:
    """The turns with a mark for each image: as they are where the number fits, else all in front of the first."""
    marks = sum(message.text.count(IMAGE_MARK) for message in prompt.messages)
    if marks == images:
        return prompt.messages
    plain = [Message(message.role, message.text.replace(IMAGE_MARK, "").strip()) for message in prompt.messages]
    first = next(i for i, message in enumerate(plain) if message.role == "user")
    plain[first] = Message("user", f"{IMAGE_MARK}\n" * images + plain[first].text)
    return tuple(plain)


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text.strip()
