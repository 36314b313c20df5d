"""The wording of what is generated: templates (YAML) and prompts (Jinja), as files that users can replace.

Each file can be overridden by one of the same name in a folder of the user's; :func:`write_texts` copies all of them
out for editing.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kore.artifacts import atomic_write
from kore.augmentation.texts.prompts import Prompt, parse_prompt
from kore.augmentation.texts.templates import parse_templates
from kore.augmentation.types import KnowledgeItem
from kore.errors import ConfigError

__all__ = ["PROMPTS", "TEMPLATES", "Texts", "as_written", "filled", "item_words", "load_texts", "write_texts"]

HERE = Path(__file__).parent
TEMPLATES = tuple(sorted(path.name for path in HERE.glob("*.yaml")))
PROMPTS = tuple(sorted(path.name for path in HERE.glob("*.j2")))
_NO_VOWEL_SOUND = ("uni", "use", "usu", "eu", "one", "ut")
_SILENT_H = ("hour", "honour", "honor", "honest", "heir")


@dataclass(frozen=True)
class Texts:
    """All templates and prompts of a run.

    Attributes:
        templates: For each YAML file (without its ending) its keys.
        prompts: For each Jinja file (without its ending) the prompt.
        digest: sha256 of all files.
    """

    templates: Mapping[str, Mapping[str, Any]]
    prompts: Mapping[str, Prompt]
    digest: str

    def identity(self) -> str:
        """sha256 of all files: what depends on the wording has it in its key."""
        return self.digest

    def variants(self, file: str, key: str) -> Any:
        """What stands under a key of a YAML file."""
        return self.templates[file][key]

    def line(self, rng: random.Random, file: str, key: str, **words: str) -> str:
        """One variant of a key, drawn and filled in."""
        return filled(str(rng.choice(self.templates[file][key])), words)

    def round(self, rng: random.Random, file: str, key: str, **words: str) -> tuple[str, str]:
        """One (question, answer) of a key, drawn and filled in."""
        drawn = rng.choice(self.templates[file][key])
        return filled(drawn["question"], words), filled(drawn["answer"], words)

    def instructed(self, rng: random.Random, question: str, form: str) -> str:
        """A question with an instruction on the form of its answer: ``yes_or_no``, ``paragraph`` or ``short``."""
        instructions = self.templates["instructions"]
        return f"{question}{instructions['separator']}{rng.choice(instructions[form])}"

    def messages(self, name: str, rng: random.Random, **words: Any) -> tuple[Mapping[str, str], ...]:
        """A prompt as chat messages.

        Raises:
            ConfigError: The prompt cannot be rendered; the message names its file.
        """
        return self.prompts[name].messages(rng, words)


def load_texts(folder: str | os.PathLike[str] | None = None) -> Texts:
    """Read the project's own files, or those of the same name in ``folder`` where there are.

    Raises:
        ConfigError: ``folder`` is missing or holds a ``.yaml`` or ``.j2`` file of another name; a file has a syntax
            error, a missing or unknown key, or a template without a placeholder that it needs. The message names
            file and key.
    """
    files = {name: HERE / name for name in (*TEMPLATES, *PROMPTS)}
    if folder is not None:
        files.update(_overrides(Path(folder), files))
    contents = {name: _read(path) for name, path in files.items()}
    return Texts(
        templates={name.removesuffix(".yaml"): parse_templates(files[name], contents[name]) for name in TEMPLATES},
        prompts={name.removesuffix(".j2"): parse_prompt(files[name], contents[name]) for name in PROMPTS},
        digest=hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest(),
    )


def write_texts(folder: str | os.PathLike[str]) -> list[Path]:
    """Copy the project's files to a folder for editing; returns their paths.

    Raises:
        ConfigError: One of the files is there already; nothing is written then.
    """
    target = Path(folder)
    files = {target / name: HERE / name for name in (*TEMPLATES, *PROMPTS)}
    if taken := [path.name for path in files if path.exists()]:
        raise ConfigError(
            f"{target}: expected none of KORE's texts there, found {', '.join(taken)}; choose a new folder"
        )
    for path, source in files.items():
        atomic_write(path, source.read_bytes())
    return list(files)


def item_words(item: KnowledgeItem) -> dict[str, str]:
    """What the placeholders type, a_type, title and name stand for; the name has the article that the text gives it."""
    name = as_written(item.title, item.text)
    return {"type": item.type, "a_type": _with_article(item.type), "title": item.title, "name": name}


def as_written(name: str, text: str) -> str:
    """A name, with "the" where the text writes it so most of the time, in small letters where the text does so."""
    found = re.findall(rf"(?<!\w)(the\s+)?({re.escape(name)})(?!\w)", text, flags=re.IGNORECASE)
    if any(written == name.lower() for _, written in found) and not any(written == name for _, written in found):
        name = name.lower()
    return f"the {name}" if 2 * sum(bool(article) for article, _ in found) > len(found) else name


def filled(template: str, words: Mapping[str, str]) -> str:
    """A template with its placeholders filled in; a word in small letters at its beginning gets a capital."""
    text = template.format_map(words)
    return text[0].upper() + text[1:] if re.match(r"[^\W\d_]+(?!\w)", text) and text.split()[0].islower() else text


def _with_article(noun: str) -> str:
    lower = noun.lower()
    vowel = lower[:1] in "aeiou" and not lower.startswith(_NO_VOWEL_SOUND)
    return f"an {noun}" if vowel or lower.startswith(_SILENT_H) else f"a {noun}"


def _overrides(folder: Path, known: Mapping[str, Path]) -> dict[str, Path]:
    if not folder.is_dir():
        raise ConfigError(f"texts: {folder}: no such folder; expected one with any of {', '.join(known)}")
    found = {path.name: path for path in sorted(folder.iterdir()) if path.suffix in (".yaml", ".yml", ".j2")}
    if unknown := [name for name in found if name not in known]:
        raise ConfigError(f"texts: {folder / unknown[0]}: expected one of {', '.join(known)}; rename or remove it")
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text in UTF-8 ({error})") from None
