"""Templates in YAML: which keys each file has, which placeholders each key needs and may have."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kore.errors import ConfigError

KIND = ("type", "a_type")
NEWS, ENTITY = (*KIND, "title"), (*KIND, "name")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Words:
    """The placeholders of a template: ``needed`` in each variant, ``allowed`` besides."""

    needed: frozenset[str]
    allowed: frozenset[str]

    def check(self, template: Any, place: str) -> str:
        """The template. Raises ConfigError naming ``place`` where it is no text or its placeholders are wrong."""
        if not isinstance(template, str) or not template.strip():
            raise ConfigError(f"{place}: expected a text, got {template!r}")
        found = set()
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise ConfigError(f"{place}: {template!r}: {error}; write {{{{ or }}}} for a brace") from None
        for _, name, form, conversion in parts:
            if name is None:
                continue
            if form or conversion or name not in self.needed | self.allowed:
                shown = ", ".join(f"{{{word}}}" for word in sorted(self.needed | self.allowed)) or "no placeholder"
                raise ConfigError(f"{place}: {template!r}: expected {shown}, got {{{name}}}")
            found.add(name)
        if missing := self.needed - found:
            names = ", ".join(f"{{{word}}}" for word in sorted(missing))
            raise ConfigError(f"{place}: {template!r}: the placeholder {names} is missing")
        return template


def _words(needed: str = "", allowed: tuple[str, ...] = ()) -> Words:
    return Words(frozenset(needed.split()), frozenset(allowed))


def _lines(words: Words) -> Callable[[Any, str], Any]:
    def check(value: Any, place: str) -> tuple[str, ...]:
        return tuple(words.check(line, f"{place}[{i}]") for i, line in enumerate(_several(value, place)))

    return check


def _rounds(words: Words) -> Callable[[Any, str], Any]:
    """(question, answer) pairs that have the needed placeholders in one of the two."""
    loose = Words(frozenset(), words.needed | words.allowed)

    def check(value: Any, place: str) -> tuple[dict[str, str], ...]:
        rounds = []
        for i, pair in enumerate(_several(value, place)):
            where = f"{place}[{i}]"
            if not isinstance(pair, dict) or set(pair) != {"question", "answer"}:
                raise ConfigError(f"{where}: expected question and answer, got {pair!r}")
            checked = {part: loose.check(pair[part], f"{where}.{part}") for part in ("question", "answer")}
            words.check(f"{checked['question']} {checked['answer']}", where)
            rounds.append(checked)
        return tuple(rounds)

    return check


def _mapping(words: Words) -> Callable[[Any, str], Any]:
    """Lines by a name of the user's."""
    lines = _lines(words)

    def check(value: Any, place: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ConfigError(f"{place}: expected names with lists of texts, got {value!r}")
        return {str(name): lines(variants, f"{place}.{name}") for name, variants in value.items()}

    return check


def _string(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{place}: expected a text, got {value!r}")
    return value


def _one(words: Words) -> Callable[[Any, str], Any]:
    return words.check


def _several(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{place}: expected a list of at least one variant, got {value!r}")
    return value


def _groups(value: Any, place: str) -> tuple[tuple[str, ...], ...]:
    """Lists of words."""
    groups = []
    for i, group in enumerate(_several(value, place)):
        if not isinstance(group, list) or len(group) < 2 or not all(isinstance(word, str) and word for word in group):
            raise ConfigError(f"{place}[{i}]: expected a list of two words or more, got {group!r}")
        groups.append(tuple(group))
    return tuple(groups)


_ITEM_NEWS, _ITEM_ENTITY = _words("title", NEWS), _words("name", ENTITY)
FILES: Mapping[str, Mapping[str, Callable[[Any, str], Any]]] = {
    "dialogue.yaml": {
        "news": _rounds(_words("type title", NEWS)),
        "entity": _rounds(_words("name", ENTITY)),
        "news_without_image": _rounds(_words("type title", NEWS)),
        "entity_without_image": _rounds(_words("name", ENTITY)),
    },
    "recognition.yaml": {"news": _lines(_ITEM_NEWS), "entity": _lines(_ITEM_ENTITY)},
    "caption.yaml": {
        "news": _lines(_words("", KIND)),
        "entity": _lines(_words("", KIND)),
        "answer": _lines(_words("depicted summary")),
    },
    "vqa.yaml": {
        "references": _lines(_words("hypernym")),
        "possessive": _lines(_words("hypernym")),
        "articles": _lines(_words()),
    },
    "instructions.yaml": {
        "yes_or_no": _lines(_words()),
        "paragraph": _lines(_words()),
        "short": _lines(_words()),
        "separator": _string,
    },
    "answers.yaml": {"form": _one(_words("schema")), "repair": _one(_words("reasons"))},
    "synonyms.yaml": {"groups": _groups},
    "rules.yaml": {
        "attributes": _mapping(_words("subject")),
        "generic": _lines(_words("subject attribute")),
        "plural": _lines(_words("subject attribute")),
        "count": _lines(_words("subject attribute")),
        "by": _lines(_words("subject attribute")),
        "when": _lines(_words("subject attribute")),
        "label": _lines(_words("subject attribute")),
        "events": _mapping(_words("subject")),
        "event_generic": _lines(_words("subject attribute")),
        "cloze": _lines(_words("sentence")),
        "cloze_about": _lines(_words("subject sentence")),
        "gap": _string,
        "opening": _lines(_words("subject")),
        "further": _lines(_words("subject")),
        "depicted_news": _lines(_ITEM_NEWS),
        "depicted_entity": _lines(_ITEM_ENTITY),
        "depicted_news_briefly": _lines(_words("", KIND)),
        "depicted_entity_briefly": _lines(_words("", KIND)),
        "news_hypernym": _string,
        "news_subject": _one(_words("title")),
    },
}


def parse_templates(path: Path, text: str) -> dict[str, Any]:
    """The keys of a template file, checked.

    Raises:
        ConfigError: Naming file and key: a syntax error, a missing or unknown key, wrong placeholders.
    """
    try:
        content = yaml.load(text, _LOADER)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    keys = FILES[path.name]
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected the keys {', '.join(keys)}, got {type(content).__name__}")
    if unknown := [str(key) for key in content if key not in keys]:
        raise ConfigError(f"{path}: unknown key {unknown[0]!r}; expected {', '.join(keys)}")
    if missing := [key for key in keys if key not in content]:
        raise ConfigError(f"{path}: the key {missing[0]!r} is missing; a file replaces KORE's own as a whole")
    return {key: check(content[key], f"{path}: {key}") for key, check in keys.items()}
