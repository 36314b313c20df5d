"""Asking a language model: from the cache where it can, within the limits, again until the answer is accepted."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel

from kore.augmentation.cache import Cache, digest
from kore.augmentation.limits import Accounting, Limits, estimate_tokens
from kore.augmentation.schema import Answer, json_schema, parse, without_thoughts
from kore.augmentation.texts import Texts, load_texts
from kore.augmentation.types import Generator, KnowledgeItem, Reply, Request, Task
from kore.errors import KoreError

CACHE_KIND = "answers"
_SHOWN_REASONS = 12

Check = Callable[[Any], tuple[Any, list[str]]]


class NotGenerated(KoreError):
    """Nothing acceptable came for one request; others may still succeed. ``reasons`` are those of the last reply."""

    def __init__(self, message: str, reasons: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.reasons = tuple(reasons)


def _listed(reasons: Sequence[str]) -> str:
    lines = [f"- {reason}" for reason in dict.fromkeys(reasons)]
    if len(lines) > _SHOWN_REASONS:
        lines[_SHOWN_REASONS:] = [f"- and {len(lines) - _SHOWN_REASONS} more of the same kinds"]
    return "\n".join(lines)


def content_of(item: KnowledgeItem) -> dict[str, Any]:
    """What of an item an answer may depend on: not its id, its image or the file it was read from."""
    return {
        "category": item.category,
        "type": item.type,
        "title": item.title,
        "text": item.text,
        "facts": dict(item.facts),
    }


class Asker:
    """Asks a generator, with cache, limits and checks. Several threads use one at once.

    The cache keeps every reply, also those that are not accepted: running again asks nothing twice and comes to the
    same end. Other answers come with another ``seed``. A generator with a false attribute ``cached`` is not cached:
    it answers faster than a file can be read.

    Args:
        generator: Answers.
        cache: Keeps the replies.
        limits: How fast and how often it is asked, and what it takes.
        attempts: How often at most a request is put, with the reasons why the last reply was not accepted; once where
            the generator has ``corrects = False``.
        seed: Of sampling and of jitter.
        texts: What a model is told about the form of its answer and about what is wrong with it; by default the
            project's own.
    """

    def __init__(
        self,
        generator: Generator,
        cache: Cache,
        limits: Limits,
        *,
        attempts: int = 3,
        seed: int = 0,
        texts: Texts | None = None,
    ) -> None:
        if attempts < 1:
            raise KoreError(f"attempts: expected at least 1, got {attempts}")
        self.generator, self.cache, self.limits = generator, cache, limits
        self.attempts, self.seed = attempts if getattr(generator, "corrects", True) else 1, seed
        self.texts = load_texts() if texts is None else texts
        self._identity = dict(generator.identity())
        self._cached = bool(getattr(generator, "cached", True))
        self._lock = threading.Lock()
        self._in_flight: dict[str, tuple[threading.Lock, int]] = {}

    @property
    def accounting(self) -> Accounting:
        """What was asked and what it took so far."""
        return self.limits.accounting

    def ask(
        self,
        task: Task,
        item: KnowledgeItem,
        messages: Sequence[Mapping[str, str]],
        schema: type[BaseModel],
        check: Check,
        max_tokens: int,
    ) -> Any:
        """Put a request until its answer is accepted, and return what is accepted.

        Args:
            task: What the answer is for.
            item: The knowledge it is about.
            messages: Chat messages, the last of the user.
            schema: What the answer has to be; of an ``Answer`` with parts, the accepted parts add up over attempts.
            check: Of a valid answer, returns what is acceptable of it, or None, and what is wrong with the rest.
                While it gives reasons the request is put again.
            max_tokens: The longest answer.

        Raises:
            NotGenerated: Nothing was acceptable in ``attempts`` replies, or the service refuses this request.
            Unavailable: The service does not answer, after the repetitions of ``limits``.
            KoreError: The service cannot be used at all, for example with this key.
        """
        accepted: Any = None
        reasons: list[str] = []
        conversation = [dict(message) for message in messages]
        for attempt in range(self.attempts):
            reply = self._reply(task, item, conversation, schema, max_tokens, attempt)
            answer, reasons = parse(reply.text, schema)
            if answer is None and reply.problem:
                reasons = [reply.problem]
            if answer is not None:
                rest, faults = check(answer)
                reasons = [*reasons, *faults]
                if rest is not None:
                    joins = isinstance(accepted, Answer) and isinstance(rest, Answer)
                    accepted = accepted.joined(rest) if joins else rest
            if accepted is not None and (not reasons or (isinstance(accepted, Answer) and self._full(accepted))):
                return accepted
            if answer is None or reasons:
                self.accounting.add(rejected=1)
            conversation = [
                *(dict(message) for message in messages),
                {"role": "assistant", "content": without_thoughts(reply.text).strip() or "(nothing)"},
                {"role": "user", "content": self._repair(reasons or ["Nothing of it can be used."])},
            ]
        if accepted is not None:
            return accepted
        tries = f"{self.attempts} replies were" if self.attempts > 1 else "The reply was"
        shown = " ".join(dict.fromkeys(reasons)) or "Nothing of it could be used."
        raise NotGenerated(f"{tries} not acceptable, at last: {shown}", reasons)

    def _repair(self, reasons: Sequence[str]) -> str:
        return str(self.texts.variants("answers", "repair").format(reasons=_listed(reasons)))

    def _form(self, schema: type[BaseModel]) -> str:
        schema_text = json.dumps(json_schema(schema), ensure_ascii=False)
        return str(self.texts.variants("answers", "form").format(schema=schema_text))

    def is_cached(
        self,
        task: Task,
        item: KnowledgeItem,
        messages: Sequence[Mapping[str, str]],
        schema: type[BaseModel],
        max_tokens: int,
    ) -> bool:
        """Whether the first reply to a request is in the cache; ``ask`` may still want further ones."""
        return self._cached and self._stored(self._key(task, item, messages, schema, max_tokens, 0)) is not None

    def _key(
        self,
        task: Task,
        item: KnowledgeItem,
        messages: Sequence[Mapping[str, str]],
        schema: type[BaseModel],
        max_tokens: int,
        attempt: int,
    ) -> dict[str, Any]:
        """All that a reply depends on."""
        return {
            "generator": self._identity,
            "task": task,
            "item": content_of(item),
            "messages": [dict(message) for message in messages],
            "form": self._form(schema),
            "max_tokens": max_tokens,
            "attempt": attempt,
            "seed": self.seed,
        }

    @staticmethod
    def _full(answer: Answer) -> bool:
        return answer.parts is not None and answer.complete

    def _reply(
        self,
        task: Task,
        item: KnowledgeItem,
        messages: Sequence[Mapping[str, str]],
        schema: type[BaseModel],
        max_tokens: int,
        attempt: int,
    ) -> Reply:
        key = self._key(task, item, messages, schema, max_tokens, attempt)
        name = digest(key)
        request = Request(
            task=task,
            item=item,
            messages=tuple(messages),
            schema=schema,
            max_tokens=max_tokens,
            attempt=attempt,
            seed=int(name[:8], 16) >> 1,
            form=key["form"],
        )
        if not self._cached:
            return self._call(request, name)
        with self._alone(name):
            stored = self._stored(key)
            if stored is not None:
                self.accounting.add(cached=1)
                return stored
            reply = self._call(request, name)
            value = {
                "text": reply.text,
                "prompt_tokens": reply.prompt_tokens,
                "completion_tokens": reply.completion_tokens,
                **({"problem": reply.problem} if reply.problem else {}),
            }
            return Reply(**self.cache.put(CACHE_KIND, key, value, durable=True))

    def _stored(self, key: Mapping[str, Any]) -> Reply | None:
        value = self.cache.get(CACHE_KIND, key)
        try:
            return None if value is None else Reply(**value)
        except TypeError:
            return None

    def _call(self, request: Request, name: str) -> Reply:
        asked = estimate_tokens(message["content"] for message in request.messages)
        reply = self.limits.call(
            lambda: self.generator.generate(request),
            name=f"{self.seed}/{name}",
            tokens=asked + request.max_tokens,
            used=lambda reply: reply.prompt_tokens + reply.completion_tokens,
        )
        self.accounting.add(
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
            unmetered=int(not reply.prompt_tokens and not reply.completion_tokens),
        )
        return reply

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """One thread at a time per request, so that two equal items ask once."""
        with self._lock:
            lock, users = self._in_flight.get(name, (threading.Lock(), 0))
            self._in_flight[name] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._lock:
                lock, users = self._in_flight[name]
                if users == 1:
                    del self._in_flight[name]
                else:
                    self._in_flight[name] = (lock, users - 1)
