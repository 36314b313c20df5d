"""Prompts in Jinja: the blocks ``system`` and ``user`` of a file become chat messages.

Knowledge goes in as values, never as a template, so nothing in a text is executed; and no value can hold one of the
marks ``<text>`` and ``</text>`` around the text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import SandboxedEnvironment

from kore.errors import ConfigError

BLOCKS = ("system", "user")
_COMMON = frozenset({"title", "type", "category", "text", "words"})
VARIABLES: Mapping[str, frozenset[str]] = {
    "dialogue.j2": _COMMON | {"rounds", "first"},
    "caption.j2": _COMMON,
    "vqa.j2": _COMMON | {"questions"},
    "rephrase.j2": _COMMON | {"number", "count"},
}
NEEDED = ("title", "text")
_MARK = re.compile(r"<(?=\s*/?\s*text\b)", re.IGNORECASE)
_ENVIRONMENT = SandboxedEnvironment(
    undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
)


@dataclass(frozen=True)
class Prompt:
    """A compiled prompt file."""

    path: Path
    template: jinja2.Template

    def messages(self, rng: random.Random, words: Mapping[str, Any]) -> tuple[Mapping[str, str], ...]:
        """The blocks as messages, ``pick`` drawing from ``rng``. Raises ConfigError naming the file."""

        def pick(variants: Sequence[str]) -> str:
            return rng.choice(variants)

        inside = {name: _MARK.sub("‹", value) if isinstance(value, str) else value for name, value in words.items()}
        found = []
        for role in BLOCKS:
            context = self.template.new_context({**inside, "pick": pick})
            try:
                content = "".join(self.template.blocks[role](context)).strip()
            except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
                raise ConfigError(f"{self.path}: block {role}: {error}") from None
            found.append({"role": role, "content": content})
        return tuple(found)


def parse_prompt(path: Path, text: str) -> Prompt:
    """Compile a prompt file.

    Raises:
        ConfigError: Naming the file: a syntax error with its line, a missing block, a variable that there is not,
            or none of one that there must be.
    """
    known = VARIABLES[path.name]
    try:
        used = jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(text)) - {"pick", "self"}
        template = _ENVIRONMENT.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{path}: line {error.lineno}: {error.message}") from None
    if missing := [block for block in BLOCKS if block not in template.blocks]:
        raise ConfigError(f"{path}: the block {missing[0]!r} is missing: {{% block {missing[0]} %}} … {{% endblock %}}")
    if unknown := sorted(used - known):
        raise ConfigError(f"{path}: unknown variable {unknown[0]!r}; expected {', '.join(sorted(known))} or pick")
    if absent := [name for name in NEEDED if name not in used]:
        raise ConfigError(f"{path}: the variable {absent[0]!r} is missing: the answer could not depend on it")
    return Prompt(path, template)
