"""The augment stage: conversations from pieces of knowledge, as new data for the stages after it."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kore.artifacts import MANIFEST, file_sha256
from kore.pipeline.config import AugmentSection
from kore.pipeline.stage import counted, directory_identity, model_identity
from kore.pipeline.workbench import Workbench

_log = logging.getLogger(__name__)

# What changes how a result is made, and not the result.
_TRIFLES: dict[str, Any] = {
    "knowledge": True,
    "workers": True,
    "limits": True,
    "texts": True,
    "generator": {"timeout", "device", "price_input", "price_output", "api_key_env"},
    "images": {"delay", "timeout", "contact", "device"},
}


@dataclass(frozen=True)
class AugmentStage:
    """Conversations, saved at ``output``. Answers and images are kept in ``cache``, also when settings change.

    The stage counts as done also where a service did not answer for some items: to try these again changes the data,
    and with them everything after it, which is the user's choice.
    """

    output: Path
    settings: AugmentSection
    cache: Path
    name: str = "augment"

    def inputs(self) -> dict[str, Any]:
        from kore.augmentation.texts import load_texts

        settings, knowledge = self.settings, self.settings.knowledge
        values = settings.model_dump(mode="json", exclude=_TRIFLES)
        flat = {f"augment.{name}": value for name, value in values.items() if not isinstance(value, dict)}
        for name, section in values.items():
            if isinstance(section, dict):
                flat |= {f"augment.{name}.{key}": value for key, value in section.items()}
        if settings.generator.kind == "local" and settings.generator.model is not None:
            flat["augment.generator.model"] = model_identity(settings.generator.model)
        if settings.images.path is not None:
            flat["augment.images.path"] = _listing(settings.images.path)
        own = directory_identity(knowledge) if knowledge.is_dir() else file_sha256(knowledge)
        return {**flat, "augment.knowledge": own, "augment.texts": load_texts(settings.texts).identity()}

    def complete(self) -> bool:
        return (self.output / MANIFEST).is_file()

    def check(self, context: Workbench) -> None:
        from kore.augmentation.run import read_knowledge
        from kore.augmentation.workshop import Workshop

        read_knowledge(self.settings.knowledge, self.settings, self.cache)
        if self.settings.generator.kind != "local":
            Workshop.open(self.settings, self.cache)

    def run(self, context: Workbench) -> str:
        from kore.augmentation.run import augment

        context.drop()
        made = augment(self.settings.knowledge, self.settings, self.output, progress=context.progress, cache=self.cache)
        context.forget()
        made_of = (counted(made.items, "item"), counted(sum(made.samples.values()), "conversation"))
        words = ", ".join((*made_of, counted(made.images, "image")))
        lost = [counted(sum(made.failures.values()), "failure")] if made.failures else []
        lost += [counted(made.bad_rows, "bad row")] if made.bad_rows else []
        if lost:
            _log.warning("%s; %s lists them", " and ".join(lost), self.output / "failures.jsonl")
        if made.passing:
            lost.append(f"{made.passing:,} of them where a service did not answer; --rerun {self.name} tries again")
        return ", ".join((words, *lost))


def _listing(path: Path) -> str:
    """A hash of what lies in a folder, by name and size, or of a file."""
    if path.is_file():
        return file_sha256(path)
    digest = hashlib.sha256()
    for entry in sorted(path.rglob("*")):
        if entry.is_file():
            digest.update(f"{entry.relative_to(path)}\0{entry.stat().st_size}\n".encode())
    return digest.hexdigest()
