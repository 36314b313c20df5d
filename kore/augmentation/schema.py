"""What a language model has to answer, as pydantic models: checked here, and sent to servers as JSON schema.

The bounds here only stop what is absurd; how long an answer may be for its task is in ``checks``.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import Self

MAX_ROUNDS = 10
MAX_QUESTIONS = 5


class Answer(BaseModel):
    """An answer. ``parts`` names its list field, where it has one: parts can be accepted one by one."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, str_strip_whitespace=True)
    parts: ClassVar[str | None] = None
    most: ClassVar[int] = 1

    @property
    def complete(self) -> bool:
        """Whether nothing can be added."""
        return self.parts is None or len(getattr(self, self.parts)) >= self.most

    def joined(self, later: Self) -> Self:
        """What was accepted before and what is accepted now, at most ``most`` parts, each question once.

        The longer of the two keeps its order, at a tie the later; the other fills up behind it.
        """
        if self.parts is None:
            return later
        before, now = getattr(self, self.parts), getattr(later, self.parts)
        first, second = (now, before) if len(now) >= len(before) else (before, now)
        from kore.augmentation.checks import same_question

        result = list(first)
        for part in second:
            if not any(same_question(part.question, other.question) for other in result):
                result.append(part)
        return type(self).model_validate({self.parts: tuple(result[: self.most])})


class Round(BaseModel):
    """A question and its answer."""

    model_config = Answer.model_config
    question: str = Field(min_length=1, max_length=600, description="A question that the text answers.")
    answer: str = Field(min_length=1, max_length=1500, description="Its answer, only with what the text says.")


class Dialogue(Answer):
    """Rounds of one conversation."""

    parts: ClassVar[str | None] = "rounds"
    most: ClassVar[int] = MAX_ROUNDS
    rounds: tuple[Round, ...] = Field(min_length=1, max_length=MAX_ROUNDS, strict=False)


class Caption(Answer):
    """What an image of the item shows, and the item in one sentence."""

    depicted: str = Field(min_length=1, max_length=300, description="Who or what the image shows.")
    summary: str = Field(min_length=1, max_length=600, description="The text in one sentence of at most 25 words.")


class Quadruplet(BaseModel):
    """A question with a short answer, about something that an image can show."""

    model_config = Answer.model_config
    # A model writes the fields in this order, so the subject comes before the question that has to hold it.
    subject: str = Field(min_length=1, max_length=200, description="Whom or what the question is about, by name.")
    hypernym: str = Field(min_length=1, max_length=100, description="What sort of thing the subject is.")
    question: str = Field(min_length=1, max_length=600, description="A question that holds the subject word for word.")
    answer: str = Field(min_length=1, max_length=200, description="A word or a short phrase from the text.")


class Questions(Answer):
    """Questions with short answers."""

    parts: ClassVar[str | None] = "questions"
    most: ClassVar[int] = MAX_QUESTIONS
    questions: tuple[Quadruplet, ...] = Field(min_length=1, max_length=MAX_QUESTIONS, strict=False)


_NOT_FOR_SERVERS = ("title", "default", "minLength", "maxLength")


@lru_cache(maxsize=64)
def json_schema(schema: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema in the subset that servers take for strict structured outputs; not to be changed.

    Bounds of strings are left out, since some servers refuse them; they are checked here in any case.
    """

    def plain(node: Any, names: bool = False) -> Any:
        if isinstance(node, list):
            return [plain(entry) for entry in node]
        if not isinstance(node, dict):
            return node
        result = {
            key: plain(value, names=key in ("properties", "$defs"))
            for key, value in node.items()
            if names or key not in _NOT_FOR_SERVERS
        }
        if not names and result.get("type") == "object":
            result["additionalProperties"] = False
            result["required"] = list(result.get("properties", {}))
        return result

    return plain(schema.model_json_schema())


_TAGS = r"(?:think|thinking|thought|thoughts|reasoning|reflection)"
_THOUGHTS = re.compile(rf".*(?:</{_TAGS}>|\[/THINK\])", re.DOTALL | re.IGNORECASE)
_UNFINISHED = re.compile(rf"\s*(?:<{_TAGS}>|\[THINK\])", re.IGNORECASE)
_DECODER = json.JSONDecoder()


def without_thoughts(text: str) -> str:
    """What a reasoning model says when it has thought; nothing where its thoughts do not end.

    Many chat templates begin the thoughts themselves, so that the reply has only the mark of their end.
    """
    if text.lstrip().startswith(("{", "```")):
        return text
    text = _THOUGHTS.sub("", text, count=1)
    return "" if _UNFINISHED.match(text) else text


def _first_object(text: str) -> tuple[dict[str, Any] | None, str]:
    """The first JSON object in the text, alone or within prose or a code fence; or why there is none."""
    text = without_thoughts(text)
    if not text.strip():
        return None, "The reply is empty; JSON is expected."
    problem = "The reply holds no JSON object."
    start = text.find("{")
    outermost = True
    while start >= 0:
        try:
            value, _ = _DECODER.raw_decode(text, start)
            return value, ""
        except json.JSONDecodeError as error:
            if outermost:
                cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
                problem = (
                    "The JSON ends before it is complete; give a shorter answer."
                    if cut
                    else f"The reply is not valid JSON: {error.msg} at character {error.pos}."
                )
                if cut:
                    return None, problem
        except RecursionError:
            return None, "The JSON is nested too deeply."
        outermost = False
        start = text.find("{", start + 1)
    return None, problem


def _sentences(error: ValidationError, place: str = "") -> list[str]:
    """One sentence for each thing that is wrong with the form."""
    result = []
    for problem in error.errors(include_url=False, include_input=False):
        where = ".".join(str(part) for part in problem["loc"])
        result.append(f"{place}{where or 'the object'}: {problem['msg'][0].lower()}{problem['msg'][1:]}.")
    return result


def _valid_parts(schema: type[Answer], value: dict[str, Any], reasons: list[str]) -> Answer | None:
    """What is valid of a list answer. Appends to ``reasons`` what is not."""
    name = schema.parts or ""
    entries = value.get(name)
    if not isinstance(entries, list):
        return None
    part: Any = {"rounds": Round, "questions": Quadruplet}[name]
    valid: list[Any] = []
    for number, entry in enumerate(entries, 1):
        try:
            valid.append(part.model_validate(entry))
        except ValidationError as error:
            reasons += _sentences(error, f"{name} {number}, ")
    if len(valid) > schema.most:
        reasons.append(
            f"{name}: at most {schema.most} are wanted, {len(valid)} came; the first {schema.most} are used."
        )
    return schema.model_validate({name: tuple(valid[: schema.most])}) if valid else None


def parse(text: str, schema: type[BaseModel]) -> tuple[BaseModel | None, list[str]]:
    """Read a reply.

    Of a list answer the valid parts are returned even when others are not.

    Returns:
        The answer, or None where nothing of it is valid; and what is wrong, in sentences for the model.
    """
    value, problem = _first_object(text)
    if value is None:
        return None, [problem]
    try:
        return schema.model_validate(value), []
    except ValidationError as error:
        reasons: list[str] = []
        if issubclass(schema, Answer) and schema.parts and value.get(schema.parts):
            partial = _valid_parts(schema, value, reasons)
            if partial is not None:
                return partial, reasons
        return None, reasons or _sentences(error)
