"""From one row of a data file to a checked conversation or question. Every problem is a DataError without a place;
the caller adds the file and line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from kore.data.types import IMAGE_MARK, Conversation, Message, Question, Role
from kore.errors import DataError
from kore.fetch import image_size, open_image, resolve_image

Format = Literal["auto", "llava", "sharegpt", "openai"]
ImageCheck = Literal["header", "decode"]

_ROLES: dict[str, dict[str, Role]] = {
    "llava": {"system": "system", "human": "user", "gpt": "assistant"},
    "sharegpt": {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    "openai": {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"},
}
_ROLES["auto"] = {**_ROLES["sharegpt"], **_ROLES["openai"]}
_TURN_LISTS: dict[str, tuple[str, ...]] = {
    "llava": ("conversations",),
    "sharegpt": ("conversations",),
    "openai": ("messages",),
    "auto": ("conversations", "messages"),
}


def check_format(name: str) -> None:
    """Raise DataError unless ``name`` is a known conversation format."""
    if name not in get_args(Format):
        raise DataError(f"format: expected one of {', '.join(get_args(Format))}, got {name!r}")


def parse_conversation(
    row: Any, root: Path, format: str = "auto", require_answer: bool = True, index: int = 0, check: str = "header"
) -> Conversation:
    """Check one row and find its images below ``root``.

    A row is ``{id, image, conversations: [{from, value}]}`` (LLaVA, ShareGPT; ``image`` or ``images``, a path or
    a list of paths) or ``{messages: [{role, content}]}`` (OpenAI; content text or a list of parts).
    """
    if not isinstance(row, Mapping):
        raise DataError(f"expected an object with a list of turns, found {type(row).__name__}")
    key = next((key for key in _TURN_LISTS[format] if row.get(key) is not None), None)
    if key is None:
        raise DataError(f"expected {' or '.join(repr(k) for k in _TURN_LISTS[format])}, found keys {sorted(row)}")
    turns = row[key]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{key!r}: expected a list of turns that is not empty, found {turns!r:.60}")
    names: list[Any] = _image_names(row)
    messages, in_parts = [], []
    for number, turn in enumerate(turns, start=1):
        message, found = _message(turn, number, _ROLES[format])
        messages.append(message)
        in_parts += found
    if names and in_parts:
        raise DataError("images are named both in the row and in its content parts; keep one of the two")
    _check_order(messages, require_answer)
    names = names or in_parts
    marks = sum(message.text.count(IMAGE_MARK) for message in messages)
    if marks != len(names):
        raise DataError(f"the text has {marks} {IMAGE_MARK} mark(s) but the row has {len(names)} image(s)")
    images = tuple(_image(name, root, check) for name in names)
    identity = row.get("id")
    return Conversation(str(index if identity is None else identity), images, tuple(messages))


def _image_names(row: Mapping[str, Any]) -> list[Any]:
    names: list[Any] = []
    for key in ("image", "images"):
        value = row.get(key)
        if isinstance(value, list | tuple):
            names += value
        elif value is not None and value != "":
            names.append(value)
    return names


def _image(name: Any, root: Path, check: str) -> Path:
    if not isinstance(name, str) or not name:
        raise DataError(f"an image is given as {type(name).__name__}; expected the path of a file below {root}")
    path = resolve_image(name, root)
    if check == "decode":
        open_image(path)
    else:
        image_size(path)
    return path


def _message(turn: Any, number: int, roles: Mapping[str, Role]) -> tuple[Message, list[Any]]:
    """One turn as a message, and the images named in its parts."""
    if not isinstance(turn, Mapping):
        raise DataError(f"turn {number}: expected an object, found {type(turn).__name__}")
    speaker = turn.get("from", turn.get("role"))
    if speaker not in roles:
        raise DataError(f"turn {number}: unknown role {speaker!r}; expected one of {', '.join(roles)}")
    content = turn.get("value", turn.get("content"))
    images: list[Any] = []
    if isinstance(content, list):
        pieces = [_part(part, number, images) for part in content]
        content = "".join(pieces)
    if not isinstance(content, str):
        raise DataError(f"turn {number}: expected text, found {type(content).__name__}")
    role = roles[speaker]
    if not content.strip():
        raise DataError(f"turn {number}: empty {'answer' if role == 'assistant' else 'text'} of {speaker!r}")
    if role != "user" and IMAGE_MARK in content:
        raise DataError(f"turn {number}: {IMAGE_MARK} in a turn of {speaker!r}; only questions can hold images")
    return Message(role, content), images


def _part(part: Any, number: int, images: list[Any]) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind in ("image_url", "image"):
        value = part.get("image_url", part.get("image", part.get("path")))
        images.append(value.get("url") if isinstance(value, Mapping) else value)
        return f"{IMAGE_MARK}\n"
    raise DataError(f"turn {number}: content part of type {kind!r}; expected text, image_url or image")


def _check_order(messages: list[Message], require_answer: bool) -> None:
    turns = messages[1:] if messages[0].role == "system" else messages
    for number, message in enumerate(turns):
        expected = "assistant" if number % 2 else "user"
        if message.role != expected:
            place = number + 1 + len(messages) - len(turns)
            raise DataError(f"turn {place}: expected a turn of the {expected}, found one of the {message.role}")
    if require_answer and len(turns) < 2:
        raise DataError("the conversation has no answer")
    if not turns:
        raise DataError("the conversation has no question")


def parse_question(row: Any, root: Path, check: str = "header") -> Question:
    """Check one evaluation row ``{question_id, image, text, answer, type}``; ``image`` and ``type`` may be left out.

    ``history``, where there is one, is a list of ``[question, answer]`` pairs: rounds before the question.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"expected an object, found {type(row).__name__}")
    fields = {}
    for key in ("question_id", "text", "answer"):
        value = row.get(key)
        if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
            raise DataError(f"{key!r}: expected text that is not empty, found {value!r:.60}")
        fields[key] = str(value)
    names = _image_names(row)
    if len(names) > 1:
        raise DataError(f"expected at most one image, found {len(names)}")
    history = _history(row.get("history"))
    marks = sum(text.count(IMAGE_MARK) for text in (fields["text"], *(asked for asked, _ in history)))
    if marks > len(names):
        raise DataError(f"the text has {marks} {IMAGE_MARK} mark(s) but the row has {len(names)} image(s)")
    image = _image(names[0], root, check) if names else None
    return Question(**fields, image=image, type=str(row.get("type") or "all"), history=history)


def _history(value: Any) -> tuple[tuple[str, str], ...]:
    rounds = value if isinstance(value, list) else [] if value is None else [value]
    for one in rounds:
        pair = isinstance(one, list | tuple) and len(one) == 2
        if not pair or not all(isinstance(text, str) and text.strip() for text in one) or IMAGE_MARK in one[1]:
            raise DataError(f"'history': expected a list of [question, answer] pairs of text, found {one!r:.60}")
    return tuple((asked, answered) for asked, answered in rounds)
