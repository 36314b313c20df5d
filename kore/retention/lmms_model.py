"""KORE's models in lmms-eval: ``python -m lmms_eval --model kore --model_args pretrained=DIR,adapter=DIR ...``.

lmms-eval imports this module by the entry point ``lmms_eval.models``; nothing else does. In contrast to the engine's
own classes it takes adapters without merging, answers in batches, also rows without image, on any device and in any
dtype, and an error ends the run in place of an empty answer that is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from lmms_eval.api.model import lmms

from kore.data.types import Message
from kore.errors import ConfigError
from kore.retention.answering import Answerer, Prompt

_DEFAULT_TOKENS = 128
_PARAGRAPH = "\n\n"
"""What lmms-eval puts in where a task names no stop; it would cut every answer of two paragraphs."""


class Kore(lmms):  # type: ignore[misc]
    """See :class:`kore.retention.answering.Answerer` for the arguments; ``max_batch_size`` is not used."""

    is_simple = True

    def __init__(
        self,
        pretrained: str = "",
        adapter: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        journal: str | None = None,
        max_new_tokens: int | str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ConfigError(
                f"model_args: unknown {', '.join(sorted(unknown))}; known: pretrained, adapter, dtype, journal, "
                "max_new_tokens"
            )
        if not pretrained:
            raise ConfigError("model_args: expected pretrained=DIR")
        self.answerer = Answerer(
            pretrained,
            adapter or None,
            dtype=dtype,
            device=device or "auto",
            batch_size=_number("batch_size", batch_size or 1),
            journal=journal,
            max_new_tokens=None if max_new_tokens is None else _number("max_new_tokens", max_new_tokens),
        )

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers in the order of the requests."""
        from tqdm import tqdm

        answers: dict[int, str] = {}
        with tqdm(total=len(requests), desc="kore", mininterval=5) as bar:
            for found in self.answerer.answer([self._prompt(request) for request in requests]):
                answers |= found
                bar.update(len(found))
        return [answers[index] for index in range(len(requests))]

    def _prompt(self, request: Any) -> Prompt:
        context, settings, visual, doc_id, task, split = request.args
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        return Prompt(
            name=f"{task} {doc_id}",
            messages=(Message("user", context),),
            images=partial(self._images, visual, task, split, doc_id),
            max_new_tokens=int(settings.get("max_new_tokens") or _DEFAULT_TOKENS),
            stops=tuple(stop for stop in stops if stop and stop != _PARAGRAPH),
        )

    def _images(self, visual: Any, task: str, split: str, doc_id: int) -> list[Any]:
        found = visual(self.task_dict[task][split][doc_id])
        return [] if found is None else list(found) if isinstance(found, list | tuple) else [found]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("kore answers by generation; choose a task with output_type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("kore has no tasks of several rounds in lmms-eval")


def manifest() -> Any:
    """What the entry point gives lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="kore", simple_class_path=f"{__name__}.Kore")


def _number(name: str, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{name}: expected a number, got {value!r}") from None
